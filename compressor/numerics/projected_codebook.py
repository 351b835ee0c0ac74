"""Weights on the points of a codebook, with gradients to the weights and to the points.

    Q(w_i) = scale_b p_a(i) + offset_b             a(i) the nearest point of the scaled weight
    dL/dp_j = sum over i with a(i) = j of scale_b dL/dQ(w_i)          (arXiv 1802.05668)

Even points that do not move are uniform quantization as the paper has it; points that move are
its differentiable quantization. The gradients of weights are those of numerics/projection.py.

Legend: O outputs, I inputs, B buckets, g weights of a bucket, P points.
"""

from typing import Any

import torch
from torch import Tensor, nn

from compressor.numerics.buckets import Buckets, scaled, stored
from compressor.numerics.codebook import nearest
from compressor.numerics.projection import (
    Backward,
    Projection,
    Rounding,
    at_random,
    cut_off,
    draws,
    matrix,
    straight_through,
)


class Codebook(Projection):
    """A weight whose buckets are scaled and rounded to the points of one codebook.

    Args:
        points_P: rising, float32, 2 to 256; even ones where rounding is stochastic.
        learns: whether the points are a parameter.
        pinned: points at exactly 0 do not move.
    """

    points_P: Tensor
    held_Bg: Tensor | None

    def __init__(
        self,
        buckets: Buckets,
        points_P: Tensor,
        learns: bool = False,
        pinned: bool = False,
        rounding: Rounding = "deterministic",
        backward: Backward = "plain",
    ) -> None:
        super().__init__()
        self.buckets = buckets
        self.rounding: Rounding = rounding
        self.backward_of: Backward = backward
        if learns:
            self.points_P = nn.Parameter(points_P.clone())
        else:
            self.register_buffer("points_P", points_P.clone())
        self.register_buffer("held_Bg", None)
        if pinned:
            self.points_P.register_hook(lambda gradient: gradient * (self.points_P != 0))

    def hold(self, w: Tensor) -> None:
        """Give every weight its nearest point, which it keeps from now on, wherever both move."""
        w_Bg = self.buckets.cut(cut_off(matrix(w.detach()), self.backward_of))
        v_Bg = scaled(w_Bg, *stored(*self.buckets.scales(w_Bg)))
        codes_Bg = nearest(v_Bg, self.points_P.detach())
        self.held_Bg = codes_Bg if self.held_Bg is None else self.held_Bg.copy_(codes_Bg)

    def forward(self, w: Tensor) -> Tensor:
        w_OI = cut_off(matrix(w), self.backward_of)
        w_Bg = self.buckets.cut(w_OI)
        scales = self.buckets.scales(w_Bg if self.backward_of == "exact" else w_Bg.detach())
        halves = stored(*scales)
        codes_Bg = self._codes(scaled(w_Bg.detach(), *halves))
        q_Bg = take(self.points_P, codes_Bg)
        if self.backward_of != "exact":
            found = self.buckets.join(_unscaled(q_Bg, *_floats(halves)), w_OI.shape)
            return (found + (w_OI - w_OI.detach()) if w.requires_grad else found).view(w.shape)
        scale_B, offset_B = (
            None if half is None or value is None else straight_through(half.float(), value)
            for half, value in zip(halves, scales, strict=True)
        )
        assert scale_B is not None
        v_Bg = scaled(w_Bg, scale_B, offset_B)
        found_Bg = _unscaled(q_Bg + (v_Bg - v_Bg.detach()), scale_B, offset_B)
        return self.buckets.join(found_Bg, w_OI.shape).view(w.shape)

    def parts(self, w: Tensor) -> dict[str, Tensor]:
        w_OI = cut_off(matrix(w.detach()), self.backward_of)
        w_Bg = self.buckets.cut(w_OI)
        scale_B, offset_B = stored(*self.buckets.scales(w_Bg))
        points_P = self.points_P.detach()
        codes_Bg = self.held_Bg
        if codes_Bg is None:
            codes_Bg = nearest(scaled(w_Bg, scale_B, offset_B), points_P)
        codes_OI = self.buckets.join(codes_Bg, w_OI.shape)
        found = {"codes_OI": codes_OI, "scale": scale_B, "points_P": points_P}
        return found if offset_B is None else found | {"offset": offset_B}

    @property
    def form(self) -> dict[str, Any]:
        points, flat = len(self.points_P), self.buckets.flat
        own = {"symmetric": self.buckets.signed, "codebook": "learned"}
        return own | {"points": points, "flat": flat}

    def _codes(self, v_Bg: Tensor) -> Tensor:
        if self.held_Bg is not None:
            return self.held_Bg
        points_P = self.points_P.detach()
        if not draws(self.rounding):
            return nearest(v_Bg, points_P)
        top = len(points_P) - 1
        place_Bg = (v_Bg - points_P[0]) * (top / (points_P[-1] - points_P[0]))
        return at_random(place_Bg).clamp_(0, top).to(torch.uint8)


def take(points_P: Tensor, codes: Tensor) -> Tensor:
    """points_P[codes], with a gradient to the points that is summed in one order."""
    return _Take.apply(points_P, codes)  # type: ignore[return-value]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points_P: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.points = len(points_P)
        return points_P[codes.long()]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (codes,), (gradient,) = ctx.saved_tensors, upstream
        sums = torch.bincount(codes.flatten(), gradient.flatten().double(), ctx.points)
        return sums.to(gradient.dtype), None


def _floats(halves: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    scale_B, offset_B = halves
    return scale_B.float(), None if offset_B is None else offset_B.float()


def _unscaled(q_Bg: Tensor, scale_B: Tensor, offset_B: Tensor | None) -> Tensor:
    found = q_Bg * scale_B.unsqueeze(-1)
    return found if offset_B is None else found + offset_B.unsqueeze(-1)
