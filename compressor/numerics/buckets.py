"""Buckets of weights and their scales: what every codebook format shares (arXiv 1802.05668).

    w^ = (w - offset_b) / scale_b          w' = points[code] * scale_b + offset_b

    linear     scale = max - min, offset = min           w^ in [0, 1]
    absmax     scale = max |w|, no offset                w^ in [-1, 1]
    absnorm    scale = |w|_2, no offset                  w^ in [-1, 1]

A bucket is `width` inputs of one row, or, flat, `width` consecutive weights of the flattened
matrix; a last short one repeats its last weight. Scales are rounded up to float16 before codes
are chosen, as those of numerics/quantizer.py are, offsets to the nearest.

Legend: O outputs, I inputs, B buckets ([O, G] where they lie in rows), g weights of a bucket.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compressor.numerics.codebook import in_buckets, out_of_buckets
from compressor.numerics.quantizer import round_up

Scaling = Literal["linear", "absmax", "absnorm"]
_FLAT_ENOUGH = 1e-10  # a bucket with a smaller spread has the smallest scale
_SMALLEST = 2.0**-24  # positive float16


@dataclass(frozen=True)
class Buckets:
    """How a weight matrix is cut, and how what was cut is scaled.

    Attributes:
        width: weights of a bucket; None: a row, or the whole matrix where flat.
        flat: buckets run over the flattened matrix.
        scaling: see above.
    """

    width: int | None
    flat: bool
    scaling: Scaling

    @property
    def signed(self) -> bool:
        """Whether scaled weights have a sign, and so no offset."""
        return self.scaling != "linear"

    def flat_width(self, shape: torch.Size) -> int | None:
        """Weights of a flat bucket of a matrix of this shape; None where buckets lie in rows."""
        return (self.width or shape.numel()) if self.flat else None

    def cut(self, w_OI: Tensor) -> Tensor:
        """The weights of every bucket [B, g]."""
        count = w_OI.shape[-1] // (self.width or w_OI.shape[-1])
        return in_buckets(w_OI, count, self.flat_width(w_OI.shape))

    def join(self, w_Bg: Tensor, shape: torch.Size) -> Tensor:
        """The matrix again."""
        return out_of_buckets(w_Bg, shape, self.flat_width(shape))

    def scales(self, w_Bg: Tensor) -> tuple[Tensor, Tensor | None]:
        """(scale, offset) [B] in float32, with a gradient to the weights that decide them."""
        if self.scaling == "linear":
            offset_B = w_Bg.amin(-1)
            return _not_flat(w_Bg.amax(-1) - offset_B), offset_B
        absmax = self.scaling == "absmax"
        return _not_flat(w_Bg.abs().amax(-1) if absmax else w_Bg.norm(dim=-1)), None


def stored(scale_B: Tensor, offset_B: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The float16 numbers that a file holds; the last point reaches the largest weight."""
    scale_B = scale_B.detach()
    if offset_B is None:
        return round_up(scale_B), None
    half_B = offset_B.detach().half()
    rest_B = offset_B.detach() + scale_B - half_B.float()
    return round_up(rest_B.clamp(min=_SMALLEST)), half_B


def scaled(w_Bg: Tensor, scale_B: Tensor, offset_B: Tensor | None) -> Tensor:
    """w^ [B, g] of weights [B, g]."""
    if offset_B is not None:
        w_Bg = w_Bg - offset_B.float().unsqueeze(-1)
    return w_Bg / scale_B.float().unsqueeze(-1)


def even_points(bits: int, scaling: Scaling) -> Tensor:
    """The points of a uniform grid over scaled weights, float32, rising.

    2^bits of them on [0, 1]; on [-1, 1] one fewer, so that 0 is exactly one of them.
    """
    if scaling == "linear":
        top = 2**bits - 1
        return torch.arange(top + 1) / top
    half = 2 ** (bits - 1) - 1
    return torch.arange(-half, half + 1) / half


def _not_flat(scale_B: Tensor) -> Tensor:
    """Where all weights of a bucket are equal, the smallest scale, whatever points learn.

    The paper has 1 there, and a bucket of zeros would follow the point that is nearest to 0.
    """
    return torch.where(scale_B < _FLAT_ENOUGH, _SMALLEST, scale_B)
