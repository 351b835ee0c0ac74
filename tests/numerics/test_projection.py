"""Projections: values are what is stored, gradients those of the formulas in float64."""

import pytest
import torch

from compressor.numerics.buckets import Buckets, even_points, scaled, stored
from compressor.numerics.codebook import lookup
from compressor.numerics.projected_codebook import Codebook
from compressor.numerics.projection import Grid, LearnedGrid, matrix
from compressor.numerics.quantizer import dequantize, grid, quantize, steps

SCALINGS = ("linear", "absmax", "absnorm")
RANDOM = {"rounding": "stochastic"}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pulled(projection, w, g):
    """Value and the gradient of sum(g * value) to the weight and to what the projection learns."""
    w = w.clone().requires_grad_(True)
    value = projection(w)
    (value * g).sum().backward()
    return value.detach(), w.grad


def differences(function, w, g, step=1e-5):
    """d sum(g * function(w)) / dw by central differences in float64."""
    w, found = w.double(), torch.zeros_like(w, dtype=torch.float64)
    for place in range(w.numel()):
        ends = []
        for sign in (1, -1):
            moved = w.clone()
            moved.view(-1)[place] += sign * step
            ends.append((function(moved) * g.double()).sum())
        found.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
    return found


def value_of(parts, flat):
    """The weight that a table of these parts has."""
    if "points_P" in parts:
        grid_of = (parts["points_P"], parts["scale"], parts.get("offset"))
        return lookup(parts["codes_OI"], *grid_of, flat)
    return dequantize(parts["codes_OI"], parts["scale_OG"], parts["zero_OG"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_is_that_of_the_quantizer_and_passes_gradients_on(bits, symmetric):
    w, g = drawn(6, 16), drawn(6, 16, seed=1)
    value, gradient = pulled(Grid(bits, 8, symmetric), w, g)
    assert torch.equal(value, dequantize(*quantize(w, bits, 8, symmetric)))
    assert torch.equal(gradient, g)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("width", "flat"), [(8, False), (None, False), (20, True), (None, True)])
def test_what_is_used_is_what_is_stored(scaling, width, flat):
    w, buckets = drawn(6, 16), Buckets(width, flat, scaling)
    for points_P, learns in ((even_points(4, scaling), False), (torch.rand(7).sort()[0], True)):
        book = Codebook(buckets, points_P, learns)
        value, gradient = pulled(book, w, drawn(6, 16, seed=1))
        assert torch.equal(value, value_of(book.parts(w), buckets.flat_width(w.shape)))
        assert torch.equal(gradient, drawn(6, 16, seed=1))
        with torch.no_grad():
            assert torch.equal(book(w), value)


def test_every_bucket_has_its_own_few_values():
    w = drawn(8, 40) * torch.logspace(-3, 3, 320).view(8, 40)
    for bits in (2, 3, 4):
        for buckets in (Buckets(64, True, "linear"), Buckets(8, False, "linear")):
            found = buckets.cut(Codebook(buckets, even_points(bits, "linear"))(w))
            counts = [len(bucket.unique()) for bucket in found.flatten(0, -2)]
            assert (4 if bits == 2 else 5) <= max(counts) <= 2**bits
        groups = Grid(bits, 8)(w).unflatten(1, (-1, 8)).flatten(0, 1)
        assert all(len(group.unique()) <= 2**bits for group in groups)


def test_even_points_are_the_papers_formula():
    """Q(v) = scale round(v^ (s - 1)) / (s - 1) + offset with s = 2^bits, signed s = 2^(bits-1)."""
    w = drawn(5, 51)
    padded = torch.cat([w.flatten(), w.flatten()[-1].repeat(1)]).view(-1, 64)  # 255 weights
    low, high = padded.amin(1, keepdim=True), padded.amax(1, keepdim=True)
    for bits in (2, 4, 8):
        s = 2**bits - 1
        wanted = low + (high - low) * ((padded - low) / (high - low) * s).round() / s
        found = Codebook(Buckets(64, True, "linear"), even_points(bits, "linear"))(w)
        error = (found.flatten() - wanted.flatten()[:255]).abs()
        assert (error < 4e-3).float().mean() > 0.97  # scales are float16: a few codes differ
        s, most = 2 ** (bits - 1) - 1, padded.abs().amax(1, keepdim=True)
        wanted = most * (padded / most * s).round() / s
        found = Codebook(Buckets(64, True, "absmax"), even_points(bits, "absmax"))(w)
        assert ((found.flatten() - wanted.flatten()[:255]).abs() < 4e-3).float().mean() > 0.97


@pytest.mark.parametrize("symmetric", [True, False])
def test_exact_gradients_of_a_grid(symmetric):
    """By differences of s(w) (q + w/s(w) - constant): rounding is passed straight through."""
    w, g = drawn(3, 8), drawn(3, 8, seed=1)
    value, gradient = pulled(Grid(3, 4, symmetric, backward="exact"), w, g)
    codes, scale, zero = quantize(w, 3, 4, symmetric)
    assert torch.allclose(value, dequantize(codes, scale, zero), atol=1e-6)
    q = (codes.double().view(3, 2, 4) - zero.double()[..., None]).flatten(1)
    wide, base = scale.double().repeat_interleave(4, 1), step_64(w.double(), symmetric)

    def used(moved):
        s = wide + step_64(moved, symmetric) - base
        return s * (q + moved / s - w.double() / wide)

    torch.testing.assert_close(gradient.double(), differences(used, w, g), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(gradient, g)


def step_64(w, symmetric):
    """max|w| / (2^2 - 1/2) or (max(w, 0) - min(w, 0)) / (2^3 - 1) of groups of 4."""
    groups = w.view(3, 2, 4)
    step = groups.abs().amax(-1) / 3.5
    if not symmetric:
        step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 7
    assert torch.allclose(step.float(), steps(w.float(), 3, 4, symmetric), rtol=1e-6)
    return step.repeat_interleave(4, 1)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("flat", [True, False])
def test_exact_gradients_of_buckets(scaling, flat):
    w, g, buckets = drawn(3, 8), drawn(3, 8, seed=1), Buckets(4, flat, scaling)
    book = Codebook(buckets, even_points(4, scaling), backward="exact")
    _, gradient = pulled(book, w, g)
    parts = book.parts(w)
    q = parts["points_P"].double()[parts["codes_OI"].long()].view(6, 4)

    def ends(matrix_64):
        cut = matrix_64.view(6, 4)
        if scaling == "linear":
            return cut.amax(1, True) - cut.amin(1, True), cut.amin(1, True)
        size = cut.abs().amax(1, True) if scaling == "absmax" else cut.norm(dim=1, keepdim=True)
        return size, torch.zeros(6, 1, dtype=torch.float64)

    halves = [parts["scale"].double().view(6, 1)]
    halves.append(parts["offset"].double().view(6, 1) if scaling == "linear" else halves[0] * 0)
    first = ends(w.double())

    def used(moved):
        scale, offset = (h + e - f for h, e, f in zip(halves, ends(moved), first, strict=True))
        v_0 = (w.double().view(6, 4) - halves[1]) / halves[0]
        return (scale * (q + (moved.view(6, 4) - offset) / scale - v_0) + offset).view(3, 8)

    torch.testing.assert_close(gradient.double(), differences(used, w, g), rtol=2e-4, atol=2e-4)


def test_exact_gradients_are_the_papers():
    """g + (dscale/dw) sum_i g_i (q_i - w^_i), at the largest and, negative, the smallest weight."""
    w, g, buckets = drawn(4, 16), drawn(4, 16, seed=1), Buckets(16, True, "linear")
    book = Codebook(buckets, even_points(2, "linear"), backward="exact")
    _, gradient = pulled(book, w, g)
    parts, wanted = book.parts(w), g.clone()
    v = scaled(w, parts["scale"], parts["offset"])
    sums = (g * (parts["points_P"][parts["codes_OI"].long()] - v)).sum(1)
    for row in range(4):
        wanted[row, w[row].argmax()] += sums[row]
        wanted[row, w[row].argmin()] -= sums[row]
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_truncated_weights_are_cut_and_beyond_get_no_gradient():
    w, g = drawn(4, 16) * 1.5, drawn(4, 16, seed=1)
    for projection in (
        Grid(4, 8, backward="truncated"),
        Codebook(Buckets(32, True, "linear"), even_points(4, "linear"), backward="truncated"),
    ):
        value, gradient = pulled(projection, w, g)
        assert torch.equal(gradient, g * (w.abs() <= 1)) and float(value.abs().max()) < 1.001
        assert torch.equal(value, value_of(projection.parts(w), 32))


@pytest.mark.parametrize("symmetric", [True, False])
def test_learned_steps_have_the_gradients_of_lsq(symmetric):
    w, g = drawn(4, 24), drawn(4, 24, seed=1)
    learned = LearnedGrid(w, 3, 8, symmetric)
    with torch.no_grad():
        learned.step_OG.mul_(0.5)  # so that weights lie beyond the grid
    value, gradient = pulled(learned, w, g)
    assert torch.equal(value, value_of(learned.parts(w), None))
    s = learned.step_OG.detach().half().double().unsqueeze(-1)
    zero, v = learned.zero_OG.double().unsqueeze(-1), w.double().view(4, 3, 8) / s
    low, high, qmax = -zero, 7 - zero, 3 if symmetric else 7
    inside = (v >= low) & (v <= high)
    slope = torch.where(inside, v.round() - v, torch.where(v < low, low, high))
    wanted = (slope * g.double().view(4, 3, 8)).sum(-1) / (8 * qmax) ** 0.5
    torch.testing.assert_close(learned.step_OG.grad.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.view(4, 3, 8), g.view(4, 3, 8) * inside)
    assert 0 < int(inside.sum()) < inside.numel()


def test_learned_steps_start_as_lsq_says():
    w = drawn(4, 24)
    wanted = 2 * w.view(4, 3, 8).abs().mean(-1) / 7**0.5
    torch.testing.assert_close(LearnedGrid(w, 4, 8).step_OG.detach(), wanted)
    scale, _ = grid(w, 4, 8, False)
    assert torch.equal(LearnedGrid(w, 4, 8, False).step_OG.detach(), scale.float())


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("scaling", ["linear", "absmax"])
def test_points_have_the_gradients_of_the_formula(flat, scaling):
    w, g = drawn(6, 16), drawn(6, 16, seed=1)
    buckets = Buckets(16 if flat else 8, flat, scaling)
    book = Codebook(buckets, torch.tensor([-0.7, -0.1, 0.2, 0.3, 0.9]), learns=True)
    pulled(book, w, g)
    parts = book.parts(w)
    points = book.points_P.detach().double().requires_grad_(True)
    width = 16 if flat else 8
    scale = parts["scale"].double().flatten().repeat_interleave(width).view(6, 16)
    offset = parts["offset"].double().flatten() if "offset" in parts else torch.zeros(1).double()
    offset = offset.repeat_interleave(width).view(6, 16) if "offset" in parts else offset
    ((points[parts["codes_OI"].long()] * scale + offset) * g.double()).sum().backward()
    torch.testing.assert_close(book.points_P.grad.double(), points.grad, rtol=1e-5, atol=1e-6)


def test_a_pinned_zero_does_not_move_and_zeros_are_it():
    w = drawn(6, 16) * (drawn(6, 16, seed=2) > 0)
    points = torch.tensor([-0.8, -0.2, 0.0, 0.4])
    book = Codebook(Buckets(8, False, "absmax"), points, learns=True, pinned=True)
    value, _ = pulled(book, w, drawn(6, 16, seed=1))
    assert bool((value[w == 0] == 0).all())
    assert (book.points_P.grad == 0).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("flat", "projection"),
    [
        (None, Grid(3, 8, rounding="stochastic")),
        (None, Grid(3, 8, False, rounding="stochastic")),
        (32, Codebook(Buckets(32, True, "linear"), even_points(3, "linear"), **RANDOM)),
        (None, Codebook(Buckets(8, False, "absmax"), even_points(3, "absmax"), **RANDOM)),
    ],
)
def test_random_rounding_is_right_on_average_and_only_where_it_trains(flat, projection):
    torch.manual_seed(0)
    w = drawn(4, 16).requires_grad_(True)
    draws = torch.stack([projection(w).detach() for _ in range(2000)])
    with torch.no_grad():
        nearest = projection(w)
    size = float((nearest.max() - nearest.min()) / 7)
    assert all(len(draws[:, o, i].unique()) <= 2 for o in range(4) for i in range(16))
    # an integer zero point may put the ends of a group up to half a step beyond the grid
    inside = (w >= draws.amin(0)) & (w <= draws.amax(0))
    assert float(inside.float().mean()) > 0.8
    torch.testing.assert_close(draws.mean(0)[inside], w.detach()[inside], rtol=0, atol=0.08 * size)
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(nearest, value_of(projection.parts(w), flat))
    torch.manual_seed(3)
    first = projection(w)
    torch.manual_seed(3)
    assert torch.equal(projection(w), first)


def test_random_rounding_keeps_zeros():
    w = (drawn(8, 16) * (drawn(8, 16, seed=2) > 0)).requires_grad_(True)
    for projection in (
        Grid(2, 8, rounding="stochastic"),
        Codebook(Buckets(8, False, "absmax"), even_points(4, "absmax"), rounding="stochastic"),
    ):
        assert all(not projection(w)[w == 0].any() for _ in range(20))


def test_weights_of_any_shape():
    kernel, bias = drawn(4, 3, 5, 5), drawn(10)
    book = Codebook(Buckets(64, True, "linear"), even_points(8, "linear"))
    assert book(kernel).shape == kernel.shape and book(bias).shape == bias.shape
    assert torch.allclose(book(kernel), kernel, atol=0.02)
    assert book.parts(kernel)["codes_OI"].shape == matrix(kernel).shape == (4, 75)


@pytest.mark.parametrize("value", [0.0, 0.3, -2.5])
def test_a_bucket_of_one_value(value):
    w = torch.full((2, 8), value)
    for scaling in SCALINGS:
        found = Codebook(Buckets(8, True, scaling), even_points(8, scaling))(w)
        assert torch.allclose(found, w, rtol=6e-2, atol=1e-6)
        moved = even_points(3, scaling) * 0.5 + 0.3  # as learning may leave them
        found = Codebook(Buckets(8, True, scaling), moved)(torch.zeros(2, 8))
        assert float(found.abs().max()) < 1e-6
    narrow = torch.tensor([[1.0, 1.0 + 1e-4] * 4])
    buckets = Buckets(8, True, "linear")
    scale, offset = stored(*buckets.scales(buckets.cut(narrow)))
    assert bool((scale > 0).all()) and float(offset) == 1.0
