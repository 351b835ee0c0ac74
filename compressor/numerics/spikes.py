"""Spiking neurons: how a membrane potential becomes spikes, and levels become binary spikes.

    u_t = x_t + decay (u_{t-1} - s_{t-1})          leaky integration, what was fired is taken off
    l_t = floor(clip(D u_t, 0, D) + 1/2)           an integer level of 0 .. D
    s_t = l_t / D                                  ds/du = 1 for 0 <= u <= 1, else 0

D = 1 is the plain leaky integrate-and-fire neuron (LIF): it fires or not. D > 1 is the
information-enhanced one of QSD (IE-LIF, arXiv 2501.13492): many levels while it trains, and D
binary spikes where it serves, since level l is l ones and D - l zeros. Between two neurons all is
linear, so D binary passes add up to the one pass with integers. A product of two spike tensors is
not: sum_d q_d k_d differs from (sum_d q_d)(sum_d k_d). There one operand is unrolled at a time and
the other keeps its integers.

Where we differ: the reset subtracts what was fired and lets no gradient through; D = null is the
neuron of the float counterpart, clip(u, 0, 1) without rounding. Every tensor here holds levels, not
l / D: integers, whose sums are exact in float32 below 2^24, so that torch and ONNX Runtime cannot
round a membrane differently. Whoever reads levels divides by D.

Legend: T time steps, D levels.
"""

import torch
from torch import Tensor

from compressor.numerics.projection import straight_through


def fire(u: Tensor, levels: int | None) -> Tensor:
    """Levels 0 .. D of a membrane potential, float32, with D times its gradient inside (0, 1).

    Args:
        u: float32 of any shape.
        levels: D; None: no rounding, values of [0, 1].
    """
    inside = u.clamp(0, 1)
    if levels is None:
        return inside
    return straight_through((u * levels).clamp(0, levels).add(0.5).floor(), inside * levels)


def integrate_and_fire(x_T: Tensor, levels: int | None, decay: float) -> Tensor:
    """Levels of every time step from the current that comes in, both [T, ...] float32."""
    found, left = [], None
    for x in x_T.unbind(0):
        u = x if left is None else x + decay * left
        found.append(fire(u, levels))
        left = u - found[-1].detach() / (levels or 1)
    return torch.stack(found)


def unroll(levels_X: Tensor, levels: int) -> Tensor:
    """Binary spikes [D, ...] that add up to levels: the first l of them are 1."""
    return torch.stack([levels_X > d for d in range(levels)]).to(levels_X.dtype)


def level_counts(levels_NC: Tensor, levels: int) -> Tensor:
    """How often each level 0 .. D occurs in N observations of C channels, float64 [D + 1, C]."""
    return torch.stack([(levels_NC == level).double().sum(dim=0) for level in range(levels + 1)])


def entropy(counts_LC: Tensor) -> float:
    """Bits that a neuron passes on: the entropy of its levels, a mean over channels.

    A neuron is a function of its membrane potential u, so I(u; l) = H(l) - H(l | u) = H(l).

    Args:
        counts_LC: see level_counts; of all observations there are, since that of few is too low.
    """
    shares_LC = counts_LC / counts_LC.sum(dim=0)
    return float(-torch.xlogy(shares_LC, shares_LC).sum(dim=0).mean() / torch.tensor(2.0).log())
