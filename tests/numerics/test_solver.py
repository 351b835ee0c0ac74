"""The column solver against the paper's formulas in float64, and against all masks there are."""

import itertools

import pytest
import torch

from compressor.numerics.masks import group_of
from compressor.numerics.solver import (
    DAMPING,
    factorize,
    in_blocks,
    in_groups,
    output_energy,
    solve,
)
from sparsegpt_reference import by_the_book


def layer(outputs, inputs, seed=0, tokens=None, dead=()):
    """A weight and the second moments of correlated inputs of uneven sizes."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=draw) / inputs**0.5
    x = torch.randn(tokens or 4 * inputs, inputs, generator=draw) @ (mix + torch.eye(inputs))
    x = x * torch.rand(inputs, generator=draw).add(0.2)
    x[:, list(dead)] = 0
    return torch.randn(outputs, inputs, generator=draw), 2 * x.T @ x / len(x)


def loss(w, new, h):
    d, h = (w - new).double(), h.double()
    return float((d @ h * d).sum() / (w.double() @ h * w.double()).sum())


def ours(w, h, pattern, sparsity, **more):
    group = group_of(pattern)
    pick = in_blocks(sparsity) if group is None else in_groups(*group)
    return solve(w, factorize(h), pick, **more)


CASES = [("unstructured", 0.5), ("unstructured", 0.8), ("2:4", 0.5), ("1:4", 0.75), ("8:16", 0.5)]


@pytest.mark.parametrize(("pattern", "sparsity"), [*CASES, ("3:6", 0.5), ("16:32", 0.5)])
@pytest.mark.parametrize("inputs", [96, 192])
def test_the_layer_error_is_that_of_the_paper(pattern, sparsity, inputs):
    w, h = layer(24, inputs)
    wanted = by_the_book(w, h, pattern, sparsity)
    got = ours(w, h, pattern, sparsity)
    assert loss(w, got, h) == pytest.approx(loss(w, wanted, h), rel=1e-4)
    assert ((got != 0) == (wanted != 0)).float().mean() > 0.999
    assert float((got == 0).float().mean()) == pytest.approx(sparsity, abs=1e-3)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_no_choice_beats_the_best_of_all_masks_and_ours_beats_most(pattern):
    found, usual = 0.0, 0.0
    for seed in range(6):
        w, h = layer(1, 8, seed)
        error = loss(w, ours(w, h, pattern, 0.5), h)
        least = sorted(least_squares(w, h, kept) for kept in masks(pattern))
        assert error >= least[0]
        found, usual = found + error, usual + least[len(least) // 4]
    assert found < usual


def masks(pattern):
    """The kept inputs of every mask of 8 inputs that keeps 4."""
    if pattern == "unstructured":
        return list(itertools.combinations(range(8), 4))
    pairs = list(itertools.combinations(range(4), 2))
    return [(*a, *(4 + i for i in b)) for a in pairs for b in pairs]


def least_squares(w, h, kept):
    """Error of the best weights on some inputs: H_kk v = (H w)_k."""
    h, kept, best = h.double(), list(kept), torch.zeros_like(w, dtype=torch.float64)
    best[0, kept] = torch.linalg.solve(h[kept][:, kept], (h @ w[0].double())[kept])
    return loss(w, best, h)


class Each:
    """A rounding of every column for itself."""

    span = 1

    def __init__(self, function):
        self.column = function

    def begin(self, first, w_CO):
        pass


def test_a_given_mask_is_kept_and_helps_choose():
    w, h = layer(16, 64)
    held = torch.rand(16, 64, generator=torch.Generator().manual_seed(1)) > 0.3
    w = w * held
    alone = ours(w, h, "unstructured", 0.5, mask_OI=held)
    assert not alone[~held].any() and float((alone == 0).float().mean()) == 0.5
    grouped = ours(w, h, "2:4", 0.5, mask_OI=held)
    assert not grouped[~held].any()
    assert int((grouped != 0).unflatten(1, (-1, 4)).sum(-1).max()) == 2


def test_a_mask_alone_changes_what_is_left_only_for_the_better():
    w, h = layer(16, 64)
    mask = torch.rand(16, 64, generator=torch.Generator().manual_seed(1)) > 0.3
    got = solve(w, factorize(h), mask_OI=mask)
    assert not got[~mask].any() and loss(w, got, h) < 0.8 * loss(w, w * mask, h)


def test_rounding_column_by_column_is_better_than_rounding_at_once():
    w, h = layer(16, 160)
    step = 0.5
    got = solve(w, factorize(h), rounding=Each(lambda i, column: (column / step).round() * step))
    assert torch.equal((got / step).round() * step, got)
    assert loss(w, got, h) < 0.7 * loss(w, (w / step).round() * step, h)
    mask = w.abs() > 0.5
    both = solve(w, factorize(h), mask_OI=mask, rounding=Each(lambda i, column: column.round() + 1))
    assert not both[~mask].any()


def test_columns_are_numbered_and_shown_as_they_are_then():
    w, h = layer(4, 40)
    seen = []
    solve(w, factorize(h), rounding=Each(lambda i, column: seen.append(i) or column))
    assert seen == list(range(40))


def test_the_inverse_of_a_large_hessian_is_one():
    _, h = layer(1, 600)
    factor = factorize(h)
    damped = h + DAMPING * h.diagonal().mean() * torch.eye(600)
    error = factor.upper_II.T @ factor.upper_II @ damped - torch.eye(600)
    assert error.abs().max() < 1e-3 and torch.equal(factor.upper_II, factor.upper_II.triu())


def test_inputs_that_are_always_zero_lose_their_weights_and_disturb_nobody():
    w, h = layer(8, 48, dead=(0, 7, 47))
    alive = [i for i in range(48) if i not in (0, 7, 47)]
    got = ours(w, h, "unstructured", 0.5)
    assert not got[:, [0, 7, 47]].any()
    part = solve(w[:, alive], factorize(h[alive][:, alive]), rounding=Each(lambda i, c: c.round()))
    whole = solve(w, factorize(h), rounding=Each(lambda i, c: c.round()))
    assert torch.allclose(whole[:, alive], part, atol=1e-5)


def test_damping_grows_until_a_singular_hessian_can_be_used():
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    h = torch.outer(vector, vector)
    assert factorize(h).damping == DAMPING  # singular, and damping is enough
    h -= 0.2 * h.diagonal().mean() * torch.eye(64)  # as rounding may make it, and worse
    factor = factorize(h)
    assert factor.damping in (DAMPING * 10, DAMPING * 100)
    assert ours(torch.randn(4, 64), h, "2:4", 0.5).isfinite().all()
    assert factorize(torch.zeros(8, 8)).dead_I.all()
    with pytest.raises(ValueError, match="NaN"):
        factorize(torch.full((4, 4), torch.nan))


def test_energy_is_that_of_the_outputs():
    w, h = layer(5, 12)
    assert output_energy(w, h) == pytest.approx(float(torch.trace(w @ h @ w.T)), rel=1e-5)
    diagonal = torch.diag(h.diagonal())
    assert output_energy(w, h.diagonal()) == pytest.approx(output_energy(w, diagonal), rel=1e-5)


@pytest.mark.parametrize("span", [4, 12, 32, 100])
def test_columns_of_a_span_are_up_to_date_when_it_begins(span):
    w, h = layer(4, 160)
    factor, seen = factorize(h), []

    class Grid(Each):
        def begin(self, first, w_CO):
            seen.append((first, w_CO.clone()))

    rounding = Grid(lambda i, column: column.round())
    rounding.span = span
    done = solve(w, factor, rounding=rounding)
    assert [first for first, _ in seen] == list(range(0, 160, span))
    left = w.double().clone()
    for first, columns in seen:
        assert torch.allclose(left[:, first : first + span].T.float(), columns, atol=1e-4)
        for j in range(first, min(first + span, 160)):
            error = (left[:, j] - done[:, j]) / factor.upper_II[j, j]
            left[:, j:] -= error[:, None] * factor.upper_II[j, j:]
