"""The quantizer against a brute-force search over the whole grid in float64."""

import pytest
import torch

from compressor.numerics.quantizer import dequantize, quantize


def grid_points(scale_OG, zero_OG, bits, group):
    """Every value a weight may take, float64 [O, I, 2^bits]."""
    codes = torch.arange(2**bits, dtype=torch.float64)
    points = (codes - zero_OG.double().unsqueeze(-1)) * scale_OG.double().unsqueeze(-1)
    return points.repeat_interleave(group, dim=1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_every_code_is_the_nearest_point(bits, group, symmetric, shift):
    torch.manual_seed(bits)
    w = torch.randn(5, 48) * torch.logspace(-6, 3, 5).unsqueeze(1) + shift
    codes, scale, zero = quantize(w, bits, group, symmetric)
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float16, torch.uint8)
    assert scale.shape == zero.shape == (5, 48 // (group or 48))
    points = grid_points(scale, zero, bits, group or 48)
    chosen = points.gather(2, codes.long().unsqueeze(-1)).squeeze(-1)
    nearest = (points - w.double().unsqueeze(-1)).abs().amin(-1)
    error = (chosen - w.double()).abs()
    step = scale.double().repeat_interleave(group or 48, dim=1)
    assert bool((error <= nearest + 1e-6 * step).all())
    assert bool((error <= step * (0.5 + 1e-6)).all())
    assert torch.equal(dequantize(codes, scale, zero), chosen.float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_weights_stay_zero(symmetric):
    w = torch.randn(4, 32) * (torch.rand(4, 32) > 0.5)
    w[0, :16] = 0
    codes, scale, zero = quantize(w, 4, 16, symmetric)
    assert scale[0, 0] == 1
    assert bool((dequantize(codes, scale, zero)[w == 0] == 0).all())


def test_symmetric_zero_point_is_the_middle():
    assert bool((quantize(torch.randn(3, 8), 4, None, True)[2] == 8).all())
    assert bool((quantize(torch.randn(3, 8), 8, None, True)[2] == 128).all())
