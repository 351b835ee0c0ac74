"""Weights on their grid, with a gradient: what stands in the place of w while it is trained.

    w' = project(w)        forward: the very numbers that the file will hold, scales in float16
    dL/dw = dL/dw'         backward: straight through, to the full-precision copy (plain)

truncated   weights are cut to [-1, 1] first, and beyond get no gradient (arXiv 1609.07061)
exact       a bucket's scale is a function of the weights that decide it, and they get
            sum_i dL/dw'_i (q_i - w^_i) dscale/dw as well (arXiv 1802.05668)
learned     the scale s is a parameter (LSQ, arXiv 1902.08153):
            dw'/ds = q - w/s inside the grid, q beyond it, where dw'/dw = 0; times 1/sqrt(n qmax)

Stochastic rounding takes the point below or above, the nearer the likelier; only with gradients,
so what is measured and stored is rounded to nearest. A projection takes a weight of any shape; its
first axis are the rows of a matrix [O, I].

Legend: O outputs, I inputs, G groups of a row, g weights of a group.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.numerics.quantizer import dequantize, encode, grid, steps

Rounding = Literal["deterministic", "stochastic"]
Backward = Literal["plain", "truncated", "exact"]
_LEAST = 2.0**-14  # of a learned step: the smallest normal float16


class Projection(nn.Module):
    """A weight on a grid or codebook; `forward` is differentiable."""

    def forward(self, w: Tensor) -> Tensor:
        """The weight as it will be stored and read back, float32."""
        raise NotImplementedError

    def parts(self, w: Tensor) -> dict[str, Tensor]:
        """What is stored of a weight, by the names of model/tables.py."""
        raise NotImplementedError

    @property
    def form(self) -> dict[str, Any]:
        """What a WeightFormat says of it besides bits and group."""
        raise NotImplementedError


class Grid(Projection):
    """The grid of numerics/quantizer.py, chosen anew from the extremes of every group."""

    def __init__(
        self,
        bits: int,
        group: int | None,
        symmetric: bool = True,
        rounding: Rounding = "deterministic",
        backward: Backward = "plain",
    ) -> None:
        super().__init__()
        self.bits, self.group, self.symmetric = bits, group, symmetric
        self.rounding: Rounding = rounding
        self.backward_of: Backward = backward

    def forward(self, w: Tensor) -> Tensor:
        w_OI = cut_off(matrix(w), self.backward_of)
        scale_OG, zero_OG = grid(w_OI.detach(), self.bits, self.group, self.symmetric)
        codes_OI = self._codes(w_OI.detach(), scale_OG, zero_OG)
        if self.backward_of != "exact":
            return straight_through(dequantize(codes_OI, scale_OG, zero_OG), w_OI).view(w.shape)
        step_OG = steps(w_OI, self.bits, self.group, self.symmetric)
        step_OG = straight_through(scale_OG.float(), step_OG)
        return on_steps(w_OI, codes_OI, step_OG, zero_OG, None).view(w.shape)

    def _codes(self, w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        if not draws(self.rounding):
            return encode(w_OI, scale_OG, zero_OG, self.bits)
        v_OGg = w_OI.unflatten(1, (scale_OG.shape[1], -1)) / scale_OG.float().unsqueeze(-1)
        codes_OGg = at_random(v_OGg) + zero_OG.unsqueeze(-1)
        return codes_OGg.clamp_(0, 2**self.bits - 1).to(torch.uint8).flatten(1)

    def parts(self, w: Tensor) -> dict[str, Tensor]:
        w_OI = cut_off(matrix(w.detach()), self.backward_of)
        scale_OG, zero_OG = grid(w_OI, self.bits, self.group, self.symmetric)
        codes_OI = encode(w_OI, scale_OG, zero_OG, self.bits)
        return {"codes_OI": codes_OI, "scale_OG": scale_OG, "zero_OG": zero_OG}

    @property
    def form(self) -> dict[str, Any]:
        return {"symmetric": self.symmetric}


class LearnedGrid(Projection):
    """A grid whose steps learn; zero points stay where they are.

    Args:
        w: the weight; steps start at 2 mean|w| / sqrt(qmax) as in LSQ, asymmetric ones at those of
            numerics/quantizer.py, which also gives the zero points.

    Attributes:
        step_OG: the steps, float32; float16 of them is used.
    """

    zero_OG: Tensor

    def __init__(self, w: Tensor, bits: int, group: int | None, symmetric: bool = True) -> None:
        super().__init__()
        w_OI = matrix(w.detach())
        self.bits, self.symmetric = bits, symmetric
        scale_OG, zero_OG = grid(w_OI, bits, group, symmetric)
        self.qmax = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
        step_OG = scale_OG.float()
        if symmetric:
            mean_OG = w_OI.abs().unflatten(1, (scale_OG.shape[1], -1)).mean(-1)
            step_OG = torch.where(mean_OG > 0, 2 * mean_OG / math.sqrt(self.qmax), step_OG)
        self.step_OG = nn.Parameter(step_OG.clamp(min=_LEAST))
        self.register_buffer("zero_OG", zero_OG)

    def forward(self, w: Tensor) -> Tensor:
        w_OI = matrix(w)
        weights = w_OI.shape[1] // self.step_OG.shape[1]
        step_OG = _shrunk_gradient(self.step_OG.clamp(min=_LEAST), weights * self.qmax)
        step_OG = straight_through(step_OG.detach().half().float(), step_OG)
        codes_OI = encode(w_OI.detach(), step_OG.detach(), self.zero_OG, self.bits)
        return on_steps(w_OI, codes_OI, step_OG, self.zero_OG, 2**self.bits - 1).view(w.shape)

    def parts(self, w: Tensor) -> dict[str, Tensor]:
        scale_OG = self.step_OG.detach().clamp(min=_LEAST).half()
        codes_OI = encode(matrix(w.detach()), scale_OG, self.zero_OG, self.bits)
        return {"codes_OI": codes_OI, "scale_OG": scale_OG, "zero_OG": self.zero_OG}

    @property
    def form(self) -> dict[str, Any]:
        return {"symmetric": self.symmetric}


def matrix(w: Tensor) -> Tensor:
    """A weight as rows of outputs; one row of a vector."""
    return w.flatten(1) if w.dim() > 1 else w.unsqueeze(0)


def straight_through(value: Tensor, w: Tensor) -> Tensor:
    """`value`, bit for bit, with the gradient of `w`."""
    return value.detach() + (w - w.detach()) if w.requires_grad else value.detach()


def cut_off(w_OI: Tensor, backward: Backward) -> Tensor:
    """The weight, between -1 and 1 where gradients are truncated."""
    return w_OI.clamp(-1, 1) if backward == "truncated" else w_OI


def draws(rounding: Rounding) -> bool:
    """Whether to round at random now: never where a loss is only measured."""
    return rounding == "stochastic" and torch.is_grad_enabled()


def at_random(v: Tensor) -> Tensor:
    """One of the two integers around v, v on average; torch's own random state is used."""
    return (v + torch.rand_like(v)).floor_()


def on_steps(
    w_OI: Tensor, codes_OI: Tensor, step_OG: Tensor, zero_OG: Tensor, top: int | None
) -> Tensor:
    """(code - zero) * step with gradients to the weights and to the steps.

    Args:
        w_OI: what the codes are of.
        top: the last code, beyond which a weight has no gradient; None: no weight lies there.
    """
    zero_OG1, step_OG1 = zero_OG.float().unsqueeze(-1), step_OG.unsqueeze(-1)
    v_OGg = w_OI.unflatten(1, (step_OG.shape[1], -1)) / step_OG1
    if top is not None:
        v_OGg = torch.minimum(torch.maximum(v_OGg, -zero_OG1), top - zero_OG1)
    q_OGg = codes_OI.float().unflatten(1, (step_OG.shape[1], -1)) - zero_OG1
    return (straight_through(q_OGg, v_OGg) * step_OG1).flatten(1)


def _shrunk_gradient(step: Tensor, count: int) -> Tensor:
    """The step itself, with its gradient divided by sqrt(count)."""
    return straight_through(step, step / math.sqrt(count))
