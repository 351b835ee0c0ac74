"""Packed codes come back, and lie in the order the file formats promise."""

import pytest
import torch

from compressor.numerics.packing import pack, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 16), (4, 1), (2, 0)])
def test_round_trip(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    assert torch.equal(unpack(packed, bits, shape[-1]), codes)


def test_first_code_is_lowest():
    codes = torch.tensor([0x1, 0xF, 0x3], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [0xF1, 0x03]
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00111001]


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_is_one_stream_of_bits(bits):
    codes = torch.randint(0, 2**bits, (11,), dtype=torch.uint8)
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    wanted = list(stream.to_bytes(-(-11 * bits // 8), "little"))
    assert pack(codes, bits).tolist() == wanted
