"""Codebooks: a weight is one of a few points, scaled by the bucket it lies in.

    w' = points[code] * scale_b (+ offset_b)

Points lie in [0, 1] where there is an offset (linear scaling: scale = max - min, offset = min) and
in [-1, 1] where there is none (scale = max |w|). Buckets are `group` inputs of one row, or, flat,
`group` consecutive weights of the flattened matrix, the last of which may be fewer.

Legend: O outputs, I inputs, P points, B buckets; [O, G] where buckets lie in rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.numerics.quantizer import round_up

# quantiles of a normal distribution (QLoRA, arXiv 2305.14314), as bitsandbytes has them
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def nearest(values: Tensor, points_P: Tensor) -> Tensor:
    """Code, uint8, of the point nearest to each value; of equal distances the lower one.

    Args:
        values: any shape, float32.
        points_P: rising, 256 at most.
    """
    assert len(points_P) <= 256
    borders = (points_P[1:] + points_P[:-1]) / 2
    return torch.bucketize(values, borders).to(torch.uint8)


def nf4(w_OI: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """Round to the nearest point of NF4: (codes_OI uint8, scale_OG float16).

    The scale is the largest |w| of a group, rounded up to float16; infinite where that cannot hold
    it, and 1 of a group of zeros.

    Args:
        w_OI: finite weights.
        group: inputs per scale, a divisor of I; None means one scale per row.
    """
    count = 1 if group is None else w_OI.shape[1] // group
    w_OGg = in_buckets(w_OI.float(), count, None)
    top_OG = w_OGg.abs().amax(-1)
    scale_OG = round_up(top_OG).masked_fill(top_OG == 0, 1.0)
    points = torch.tensor(NF4, device=w_OI.device)
    return nearest(w_OGg / scale_OG.float().unsqueeze(-1), points).flatten(-2), scale_OG


def lookup(
    codes_OI: Tensor, points_P: Tensor, scale: Tensor, offset: Tensor | None, flat: int | None
) -> Tensor:
    """The weights [..., I], float32.

    Args:
        codes_OI: uint8 [..., I]; the whole matrix [O, I] where buckets are flat.
        points_P: float32.
        scale, offset: float16 [..., G], or [B] where buckets are flat.
        flat: weights of a flat bucket; None: the last axis is cut into G buckets.
    """
    found = in_buckets(points_P[codes_OI.long()], scale.shape[-1], flat)
    found = found * scale.float().unsqueeze(-1)
    if offset is not None:
        found = found + offset.float().unsqueeze(-1)
    return out_of_buckets(found, codes_OI.shape, flat)


def in_buckets(w: Tensor, count: int, flat: int | None) -> Tensor:
    """Weights as buckets [..., G, group] or [B, flat]; a last short one repeats its last weight."""
    if flat is None:
        return w.unflatten(-1, (count, -1))
    missing = -w.numel() % flat
    row = w.reshape(1, -1)
    return (
        pad(row, (0, missing), mode="replicate").view(-1, flat) if missing else row.view(-1, flat)
    )


def out_of_buckets(found: Tensor, shape: torch.Size, flat: int | None) -> Tensor:
    """The reverse of `in_buckets`."""
    return found.flatten(-2) if flat is None else found.flatten()[: shape.numel()].view(shape)
