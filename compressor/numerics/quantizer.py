"""Uniform quantization: every group of inputs of a row shares one scale and one zero point.

    code = clip(round(w / scale) + zero, 0, 2^bits - 1)        w' = (code - zero) * scale

Shapes: O outputs, I inputs, g inputs per group, G = I / g groups per row.
    w_OI float32, codes_OI uint8, scale_OG float16, zero_OG uint8.

The scale is rounded to float16 *before* codes are chosen, and always upwards: then no weight is
further off than scale / 2, and every writer carries the same numbers. The zero point is an
integer, so a weight that is exactly 0 (a pruned one) stays 0.
"""

import torch
from torch import Tensor


def grid(w_OI: Tensor, bits: int, group: int | None, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Choose the grid of every group from its extreme values.

    Args:
        w_OI: finite float32 weights [O, I].
        bits: 1 < bits <= 8.
        group: inputs per scale, a divisor of I; None means one scale per row.
        symmetric: centre the grid on zero, zero = 2^(bits-1) and scale = max|w| / (zero - 1/2), so
            that an extreme of either sign is half a step off at most; else span
            [min(w, 0), max(w, 0)] with 2^bits - 1 steps.

    Returns:
        (scale_OG float16, zero_OG uint8). A group of zeros has scale 1.
    """
    step_OG = steps(w_OI, bits, group, symmetric)
    scale_OG = round_up(step_OG).masked_fill(step_OG == 0, 1.0)
    assert bool(scale_OG.isfinite().all()), "weights are not finite, or too large for float16"
    if symmetric:
        return scale_OG, torch.full_like(scale_OG, 2 ** (bits - 1), dtype=torch.uint8)
    low_OG = _split(w_OI, group).amin(-1).clamp(max=0)
    zero_OG = (-low_OG / scale_OG.float()).round().clamp(0, 2**bits - 1)
    return scale_OG, zero_OG.to(torch.uint8)


def steps(w_OI: Tensor, bits: int, group: int | None, symmetric: bool) -> Tensor:
    """The scales of `grid` before they are rounded [O, G], float32, with a gradient."""
    w_OGg = _split(w_OI, group)
    low_OG, high_OG = w_OGg.amin(-1).clamp(max=0), w_OGg.amax(-1).clamp(min=0)
    if symmetric:
        return torch.maximum(-low_OG, high_OG) / (2 ** (bits - 1) - 0.5)
    return (high_OG - low_OG) / (2**bits - 1)


def encode(w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, bits: int) -> Tensor:
    """Return codes_OI uint8: the nearest point of the given grid for every weight."""
    w_OGg = w_OI.float().unflatten(1, (scale_OG.shape[1], -1))
    codes_OGg = (w_OGg / scale_OG.float().unsqueeze(-1)).round_() + zero_OG.unsqueeze(-1)
    return codes_OGg.clamp_(0, 2**bits - 1).to(torch.uint8).flatten(1)


def quantize(
    w_OI: Tensor, bits: int, group: int | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest: (codes_OI uint8, scale_OG float16, zero_OG uint8); see `grid`."""
    scale_OG, zero_OG = grid(w_OI, bits, group, symmetric)
    return encode(w_OI, scale_OG, zero_OG, bits), scale_OG, zero_OG


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return (code - zero) * scale as float32, shaped like `codes`.

    The last axis of `codes` [..., I] is cut into as many groups as `scale` and `zero` [..., G]
    have.
    """
    grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return ((grouped - zero.unsqueeze(-1)) * scale.float().unsqueeze(-1)).flatten(-2)


def _split(w_OI: Tensor, group: int | None) -> Tensor:
    width = w_OI.shape[1] if group is None else group
    assert w_OI.shape[1] % width == 0, f"a group of {width} does not divide {w_OI.shape[1]} inputs"
    return w_OI.float().unflatten(1, (-1, width))


def round_up(step: Tensor) -> Tensor:
    """The smallest float16 that is not below a positive float32."""
    half = step.half()
    next_half = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < step, next_half, half)
