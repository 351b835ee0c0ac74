"""Training through projected weights: gradients are those of the quantized model, ties included."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from compressor.numerics.buckets import Buckets, even_points
from compressor.numerics.projected_codebook import Codebook
from compressor.numerics.projection import Grid, Projection
from compressor.quantize import distilled
from compressor.quantize.trained import trained_targets, users
from compressor.quantize.weights import weight_of
from compressor.training import losses
from compressor.training.projected import Projected, projected
from families import CONFIGS, pico
from predicting import labelled


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_the_quantized_model(family, monkeypatch):
    """For every parameter; a tied table, used twice and in chunks by the head, gets one sum."""
    monkeypatch.setattr(losses, "chunk_of", lambda vocabulary: 7)
    monkeypatch.setattr("compressor.distill.predictions.chunk_of", lambda vocabulary: 7)
    model, dense, teacher = pico(family), pico(family), pico(family, seed=1)
    options = distilled.Options(bits=4, group=16)
    found = trained_targets(model, options)
    grid, batch = Grid(4, 16), labelled(model)
    layers = [(users(model, target), grid) for target in found]
    own = Projected(distilled.objective(options, model, teacher), layers)
    own(batch).backward()
    with torch.no_grad():
        for target in found:
            weight_of(dense, target.name).copy_(grid(weight_of(dense, target.name)))
    wanted = distilled.objective(options, dense, teacher)
    wanted(batch).backward()
    assert own(batch).item() == wanted(batch).item()
    assert own.parts.keys() == {"logits", "ce"}
    there = dict(dense.module.named_parameters())
    for name, parameter in model.module.named_parameters():
        if there[name].grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, there[name].grad, rtol=1e-5, atol=1e-7)


def test_afterwards_the_modules_hold_what_trains():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = weight = first.weight
    with pytest.raises(KeyError), projected([((first, second), Grid(2, 4))]):
        assert first.weight is second.weight is not weight
        assert torch.equal(first.weight, Grid(2, 4)(weight))
        raise KeyError
    assert first.weight is second.weight is weight


def test_one_draw_serves_all_uses_of_a_pass():
    class Seen(Projection):
        calls = 0

        def forward(self, w):
            self.calls += 1
            return Grid(2, 4, rounding="stochastic")(w)

    table, head, seen = nn.Embedding(6, 8), nn.Linear(8, 6, bias=False), Seen()
    head.weight = table.weight

    class Loss(nn.Module):
        def forward(self, ids):
            assert torch.equal(table.weight, head.weight)
            return cross_entropy(head(table(ids)), ids)

    Projected(Loss(), [((table, head), seen)])(torch.arange(6)).backward()
    assert seen.calls == 1 and table.weight.grad is not None


def test_a_frozen_weight_and_a_codebook_that_learns():
    table = nn.Embedding(6, 8).requires_grad_(False)
    book = Codebook(Buckets(16, True, "linear"), even_points(2, "linear"), learns=True)

    class Loss(nn.Module):
        def forward(self, ids):
            return table(ids).square().sum()

    for _ in range(2):  # gradients of several passes add up
        Projected(Loss(), [((table,), book)])(torch.arange(6)).backward()
    points = book.points_P.detach().double().requires_grad_(True)
    parts = book.parts(table.weight)
    scale, offset = (
        parts[k].double().repeat_interleave(16).view(6, 8) for k in ("scale", "offset")
    )
    (2 * (points[parts["codes_OI"].long()] * scale + offset).square().sum()).backward()
    torch.testing.assert_close(book.points_P.grad.double(), points.grad, rtol=1e-5, atol=1e-6)
    assert table.weight.grad is None


def test_a_convolution():
    conv = nn.Conv2d(3, 4, 3)
    book = Codebook(Buckets(27, False, "linear"), even_points(8, "linear"))

    class Loss(nn.Module):
        def forward(self, x):
            return conv(x).square().mean()

    x = torch.randn(2, 3, 8, 8)
    Projected(Loss(), [((conv,), book)])(x).backward()
    rounded = book(conv.weight).detach().requires_grad_(True)
    torch.nn.functional.conv2d(x, rounded, conv.bias).square().mean().backward()
    torch.testing.assert_close(conv.weight.grad, rounded.grad)
