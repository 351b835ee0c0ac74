"""Small codes in whole bytes: the first code of the last axis sits in the lowest bits.

This is the order of ONNX Runtime's MatMulNBits and GatherBlockQuantized and of our checkpoints.
A byte holds 8 / bits codes; a last byte that is not full is padded with zero bits.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., n] into uint8 [..., ceil(n * bits / 8)]; bits is 1, 2, 4 or 8."""
    assert codes.dtype == torch.uint8 and bits in (1, 2, 4, 8)
    per_byte = 8 // bits
    padded = pad(codes, (0, -codes.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    packed = padded[..., 0].clone()
    for place in range(1, per_byte):
        packed |= padded[..., place] << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the `n` codes of every row of `pack`'s result, uint8 [..., n]."""
    assert packed.dtype == torch.uint8 and bits in (1, 2, 4, 8)
    places = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(places, dim=-1).flatten(-2)[..., :n].contiguous()
