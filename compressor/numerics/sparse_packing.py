"""A matrix with zeros in little space: where the kept values lie, and the values themselves.

    bitmask   mask_OB     uint8 [O, ceil(I / 8)]   bit i % 8 of byte i // 8: input i is kept
              values_K    [K]                      kept values, row by row
    N:M       index_OB    uint8 [O, ceil(G N b / 8)]   places 0..M-1 of the values of a group
              values_OGN  [O, G, N], G = I / M         by ascending place

b is 1, 2, 4 or 8, the smallest with 2^b >= M, and lowest bits come first (packing.py). N:M stores
N values of every group: one with fewer is filled up with zeros, at its first places that are free.
Both layouts are row-major and the same on every machine.

Kept is what differs from zero. So values come back bit for bit, NaN payloads too, and -0.0 comes
back as 0.0: pruning by `weight * mask` leaves -0.0 wherever a negative weight went.

Legend: O outputs, I inputs, K kept values, G groups of M inputs, B bytes of a row.
"""

import torch
from torch import Tensor

from compressor.numerics.packing import pack, unpack

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ROWS = 1024  # of a matrix at once: places are int64 for a while, several times its size


def index_bits(m: int) -> int | None:
    """Bits of a place in a group of `m` inputs; None where a byte is too small for it."""
    return next((bits for bits in (1, 2, 4, 8) if 2**bits >= m), None)


def index_bytes(groups: int, n: int, m: int) -> int:
    """Bytes of one row of index_OB."""
    bits = index_bits(m)
    assert bits is not None, f"groups of {m}"
    return -(-groups * n * bits // 8)


def pack_bitmask(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(mask_OB, values_K in the dtype of `w_OI`) of a matrix of any dtype."""
    kept_OI = w_OI != 0
    return pack(kept_OI.to(torch.uint8), 1), _raw(w_OI)[kept_OI].view(w_OI.dtype)


def unpack_bitmask(mask_OB: Tensor, values_K: Tensor, inputs: int) -> Tensor:
    """The matrix [O, inputs] of `pack_bitmask`'s result.

    Raises:
        ValueError: the mask keeps another number of values than there are.
    """
    kept_OI = unpack(mask_OB, 1, inputs).bool()
    kept = int(kept_OI.sum())
    if kept != len(values_K):
        raise ValueError(f"the mask keeps {kept} values and {len(values_K)} are stored")
    raw_K = _raw(values_K)
    raw_OI = raw_K.new_zeros(kept_OI.shape)
    raw_OI[kept_OI] = raw_K
    return raw_OI.view(values_K.dtype)


def pack_groups(w_OI: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """(index_OB, values_OGN in the dtype of `w_OI`) of a matrix that has the pattern n:m."""
    bits = index_bits(m)
    assert bits is not None, f"groups of {m}"
    parts = []
    for rows_RI in w_OI.split(ROWS):
        kept_RGM = (rows_RI != 0).unflatten(1, (-1, m))
        fillers_RG1 = n - kept_RGM.sum(-1, keepdim=True)
        assert (fillers_RG1 >= 0).all(), f"more than {n} of {m}"
        free_RGM = ~kept_RGM
        chosen_RGM = kept_RGM | (free_RGM & (free_RGM.cumsum(-1, dtype=torch.int16) <= fillers_RG1))
        # as integers: kernels for floats make signalling NaNs quiet; a filler may be -0.0
        raw_RGM = _raw(rows_RI).unflatten(1, (-1, m)).masked_fill(free_RGM, 0)
        value_RGN = raw_RGM[chosen_RGM].view(*chosen_RGM.shape[:2], n)
        place_RGN = torch.arange(m).to(torch.uint8).expand(chosen_RGM.shape)[chosen_RGM]
        place_RGN = place_RGN.view(value_RGN.shape)
        parts.append((pack(place_RGN.flatten(1), bits), value_RGN))
    index, values = zip(*parts, strict=True)
    return torch.cat(index), torch.cat(values).view(w_OI.dtype)


def unpack_groups(index_OB: Tensor, values_OGN: Tensor, m: int) -> Tensor:
    """The matrix [O, G * m] of `pack_groups`'s result.

    Raises:
        ValueError: the places of a group do not ascend within 0..m-1.
    """
    bits, (_, groups, n) = index_bits(m), values_OGN.shape
    assert bits is not None, f"groups of {m}"
    raw_OGN = _raw(values_OGN)
    raw_OGM = raw_OGN.new_zeros(*raw_OGN.shape[:2], m)
    split = (index_OB.split(ROWS), raw_OGN.split(ROWS), raw_OGM.split(ROWS))
    for index_RB, value_RGN, out_RGM in zip(*split, strict=True):
        place_RGN = unpack(index_RB, bits, groups * n).view(value_RGN.shape).long()
        ascends = place_RGN[..., 1:] > place_RGN[..., :-1]
        if not ascends.all() or (place_RGN >= m).any():
            raise ValueError(f"the places in a group of {m} do not ascend")
        out_RGM.scatter_(-1, place_RGN, value_RGN)
    return raw_OGM.flatten(1).view(values_OGN.dtype)


def _raw(tensor: Tensor) -> Tensor:
    """The same memory as integers, which every kernel copies as they are."""
    return tensor.contiguous().view(_INTEGERS[tensor.dtype.itemsize])
