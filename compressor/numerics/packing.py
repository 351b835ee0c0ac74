"""Small codes in whole bytes: the first code of the last axis sits in the lowest bits.

Code i takes bits i * bits to (i + 1) * bits of a row, counted from the lowest bit of its first
byte; a last byte that is not full is padded with zero bits. With 2, 4 and 8 bits this is the order
of ONNX Runtime's MatMulNBits and GatherBlockQuantized.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., n] into uint8 [..., ceil(n * bits / 8)]; 1 <= bits <= 8."""
    assert codes.dtype == torch.uint8 and 1 <= bits <= 8
    if 8 % bits:
        return _pack_across(codes, bits)
    per_byte = 8 // bits
    padded = pad(codes, (0, -codes.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    packed = padded[..., 0].clone()
    for place in range(1, per_byte):
        packed |= padded[..., place] << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the `n` codes of every row of `pack`'s result, uint8 [..., n]."""
    assert packed.dtype == torch.uint8 and 1 <= bits <= 8
    if 8 % bits:
        return _unpack_across(packed, bits, n)
    places = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(places, dim=-1).flatten(-2)[..., :n].contiguous()


def _pack_across(codes: Tensor, bits: int) -> Tensor:
    """Codes that cross the borders of bytes: eight of them fill `bits` bytes."""
    size = -(-codes.shape[-1] * bits // 8)
    eights = pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8)).long()
    joined = torch.zeros_like(eights[..., 0])
    for place in range(8):
        joined |= eights[..., place] << (place * bits)
    parts = [(joined >> (8 * i)) & 0xFF for i in range(bits)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :size].to(torch.uint8)


def _unpack_across(packed: Tensor, bits: int, n: int) -> Tensor:
    parts = pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).long()
    joined = torch.zeros_like(parts[..., 0])
    for i in range(bits):
        joined |= parts[..., i] << (8 * i)
    places = [(joined >> (place * bits)) & (2**bits - 1) for place in range(8)]
    return torch.stack(places, dim=-1).flatten(-2)[..., :n].to(torch.uint8)
