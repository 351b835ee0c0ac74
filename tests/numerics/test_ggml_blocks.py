"""Blocks of GGUF against the library gguf, which reads them, and our own grid, which they hold."""

import pytest
import torch

from compressor.numerics.ggml_blocks import BY_NAME, FORMS, holds, pack, reach
from compressor.numerics.quantizer import dequantize, quantize

gguf = pytest.importorskip("gguf", reason="pip install 'compress[gguf]'")


def read(form, blocks):
    kind = gguf.GGMLQuantizationType[form.name.upper()]
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind).copy())


@pytest.mark.parametrize("group", [32, 96, None])
@pytest.mark.parametrize(
    ("bits", "symmetric", "smallest"),
    [
        (2, True, "q4_0"),
        (2, False, "q4_0"),
        (3, True, "q4_0"),
        (3, False, "q4_0"),
        (4, True, "q4_0"),
        (4, False, "q5_0"),
        (8, True, "q8_0"),
    ],
)
def test_every_form_that_holds_a_grid_gives_it_back(bits, symmetric, smallest, group):
    torch.manual_seed(bits)
    w_OI = torch.randn(1030, 192) + 0.3  # more rows than are packed at once
    grid = quantize(w_OI, bits, group, symmetric)
    held = [form for form in FORMS if holds(form, *grid)]
    assert held and held[-1].name == "q8_0"
    names = {form.name for form in held}
    assert smallest in names or "q4_0" in names
    for form in held:
        blocks = pack(form, *grid)
        assert blocks.shape == (1030, 6 * form.bytes)
        assert torch.equal(read(form, blocks), dequantize(*grid)), form.name


def test_zero_points_in_q4_1_where_float16_has_the_product():
    codes, scale, zero = quantize(torch.randn(8, 64), 4, 32, False)
    scale[:] = 1 + 2**-10  # eleven significant bits
    form = BY_NAME["q4_1"]
    zero[:] = 8
    assert holds(form, codes, scale, zero)
    assert torch.equal(read(form, pack(form, codes, scale, zero)), dequantize(codes, scale, zero))
    zero[3, 1] = 7  # 7 * (1 + 2^-10) needs thirteen
    assert not holds(form, codes, scale, zero)


def test_eight_bits_with_zero_points_fit_nothing():
    codes, scale = torch.full((2, 32), 255, dtype=torch.uint8), torch.ones(2, 1).half()
    zero = torch.full((2, 1), 100, dtype=torch.uint8)
    assert not any(holds(form, codes, scale, zero) for form in FORMS)
    assert holds(BY_NAME["q8_0"], codes, scale, zero + 28)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_reach_is_that_of_all_codes(bits, symmetric):
    zeros = [2 ** (bits - 1)] if symmetric else range(2**bits)
    ends = [(code - zero) for zero in zeros for code in range(2**bits)]
    assert reach(bits, symmetric) == (min(ends), max(ends))
