"""Spiking neurons against a loop over scalars, and levels against their binary spikes."""

import math

import pytest
import torch

from compressor.numerics.spikes import entropy, fire, integrate_and_fire, level_counts, unroll


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 8])
def test_levels_are_those_of_the_paper(levels):
    u = torch.arange(-45, 110) / 64  # exact in float32
    wanted = [math.floor(min(max(levels * x, 0), levels) + 0.5) for x in u.tolist()]
    assert fire(u, levels).tolist() == wanted
    assert set(fire(u, levels).tolist()) == set(range(levels + 1))


def test_the_gradient_goes_straight_through_inside_and_nowhere_else():
    u = torch.tensor([-0.5, 0.1, 0.6, 0.9, 1.5], requires_grad=True)
    (fire(u, 4) / 4).sum().backward()
    assert u.grad.tolist() == [0, 1, 1, 1, 0]


def test_neurons_that_do_not_round_only_clip():
    assert fire(torch.tensor([-1.0, 0.3, 2.0]), None).tolist() == [0.0, pytest.approx(0.3), 1.0]


@pytest.mark.parametrize("levels", [1, 4])
def test_integration_over_time(levels):
    x_TN = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    found = integrate_and_fire(x_TN, levels, 0.5)
    for neuron in range(7):
        left = 0.0
        for step in range(5):
            u = float(x_TN[step, neuron]) + 0.5 * left
            level = math.floor(min(max(levels * u, 0), levels) + 0.5)
            assert found[step, neuron] == level
            left = u - level / levels


def test_binary_spikes_add_up_to_levels():
    levels = torch.tensor([[0.0, 1.0], [3.0, 4.0]])
    spikes = unroll(levels, 4)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(spikes.sum(dim=0), levels)


def test_a_product_of_spikes_is_unrolled_one_operand_at_a_time():
    """Step by step, sum_d q_d k_d, it would be another number."""
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randint(0, 5, (6, 6), generator=draw).float() for _ in range(2))
    assert torch.equal((unroll(q, 4) @ k).sum(dim=0), q @ k)
    assert not torch.equal((unroll(q, 4) @ unroll(k, 4)).sum(dim=0), q @ k)


def test_entropy_is_that_of_the_levels_of_a_channel():
    levels_NC = torch.tensor([[0, 0, 2], [0, 1, 2], [0, 2, 0], [0, 3, 0]])
    counts_LC = level_counts(levels_NC, 4)
    assert counts_LC.shape == (5, 3) and entropy(counts_LC) == pytest.approx((0 + 2 + 1) / 3)
    halves = level_counts(levels_NC[:2], 4) + level_counts(levels_NC[2:], 4)
    assert torch.equal(halves, counts_LC)
