"""Where points start, how many a tensor gets, and how they are sorted."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from compressor.quantize.points import InTurns, mean_gap, shared_points, sort_points, start_points


def scaled_weights():
    return torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) ** 2


def test_quantiles_are_numpys():
    found = start_points(scaled_weights(), 16, "quantiles", False, False)
    wanted = np.percentile(scaled_weights().numpy(), np.linspace(0, 100, 16))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
    assert start_points(scaled_weights(), 5, "uniform", False, False).tolist() == [
        0,
        0.25,
        0.5,
        0.75,
        1,
    ]
    assert start_points(scaled_weights(), 3, "uniform", True, False).tolist() == [-1, 0, 1]


@pytest.mark.parametrize("count", [2, 3, 16, 256])
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("start", ["quantiles", "uniform"])
def test_points_differ_whatever_the_weights(count, pinned, start):
    sparse = scaled_weights() * (scaled_weights() > 0.8)
    for v in (sparse, torch.zeros(8, 8), torch.ones(4, 4), torch.tensor([0.5, 0.25])):
        points = start_points(v, count, start, True, pinned)
        assert len(points) == count and points.dtype == torch.float32
        assert bool((points.diff() > 0).all())
        assert not pinned or 0.0 in points.tolist()


def test_half_is_shared_and_the_rest_follows_gradients():
    assert shared_points([1.0, 1.0, 1.0], 16) == [16, 16, 16]
    assert shared_points([3.0, 1.0, 0.0], 16) == [26, 14, 8]
    assert shared_points([0.0, 0.0], 4) == [4, 4]
    assert shared_points([5.0, 1.0], 256) == [256, 256]  # 2^8 codes are the most


@pytest.mark.parametrize("count", [4, 8, 16, 256])
def test_no_point_is_lost(count):
    draw = np.random.default_rng(0)
    for tensors in (1, 3, 40):
        found = shared_points((draw.random(tensors) ** 4).tolist(), count)
        assert sum(found) == count * tensors
        assert max(count // 2, 2) <= min(found) and max(found) <= 256


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_what_is_remembered_of_a_point_is_sorted_with_it(kind):
    points = nn.Parameter(torch.tensor([0.3, 0.1, 0.2]))
    optimizer = kind([points], **({"lr": 0.0} if kind is Adam else {"lr": 0.0, "momentum": 0.9}))
    points.grad = torch.tensor([30.0, 10.0, 20.0])
    optimizer.step()
    sort_points([points], optimizer)
    assert points.tolist() == pytest.approx([0.1, 0.2, 0.3])
    moments = optimizer.state[points]["exp_avg" if kind is Adam else "momentum_buffer"]
    assert moments[0] < moments[1] < moments[2]


def test_the_mean_gap():
    assert mean_gap(torch.tensor([0.5, 0.6, 1.1])) == pytest.approx(0.3)


def test_turns():
    weight, points = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    clock = nn.Module()
    clock.done = torch.zeros((), dtype=torch.int64)
    group = {"params": [points], "lr": 0.1, "weight_decay": 0.0}
    optimizer = InTurns([{"params": [weight], "lr": 0.1}], [group], 2, clock, (0.9, 0.98))
    moved = []
    for step in range(1, 7):
        before = weight.clone(), points.clone()
        weight.grad, points.grad = torch.ones(2), torch.ones(3)
        optimizer.step()
        moved.append([not torch.equal(a, b) for a, b in zip(before, (weight, points), strict=True)])
        clock.done.fill_(step)
    assert moved == [[True, False]] * 2 + [[False, True]] * 2 + [[True, False]] * 2
