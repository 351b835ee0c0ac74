"""The operators against plain formulas, and against torch's own rules for custom operators."""

import numpy as np
import torch

from compressor.numerics.ops import (
    dynamic_int8_linear,
    quant_linear,
    range_grid,
    static_int8_linear,
    token_int8_linear,
)
from compressor.numerics.quantizer import dequantize, quantize


def test_quant_linear_multiplies_by_the_dequantized_weight():
    codes, scale, zero = quantize(torch.randn(6, 32), 4, 16, False)
    x, bias = torch.randn(2, 3, 32), torch.randn(6)
    wanted = x.double() @ dequantize(codes, scale, zero).double().T + bias
    assert torch.allclose(quant_linear(x, codes, scale, zero, bias).double(), wanted, atol=1e-5)
    torch.library.opcheck(quant_linear, (x, codes, scale, zero, None))


def test_dynamic_int8_linear_is_onnx_arithmetic():
    """DynamicQuantizeLinear and MatMulInteger as the ONNX standard words them, in integers."""
    x, w = torch.randn(4, 20) * 3, torch.randint(-127, 128, (20, 5), dtype=torch.int8)
    scale, bias = torch.rand(5), torch.randn(5)
    a = x.numpy()
    step = np.float32((max(a.max(), 0) - min(a.min(), 0)) / np.float32(255))
    zero = int(np.clip(np.rint(-min(a.min(), 0) / step), 0, 255))
    codes = np.clip(np.rint(a / step) + zero, 0, 255).astype(np.int64)
    wanted = (codes - zero) @ w.numpy().astype(np.int64) * np.float64(step) * scale.numpy()
    got = dynamic_int8_linear(x, w, scale, bias).numpy()
    np.testing.assert_allclose(got, wanted + bias.numpy(), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(dynamic_int8_linear, (x, w, scale, bias))


def test_dynamic_int8_linear_of_zeros_is_the_bias():
    w = torch.ones(4, 3, dtype=torch.int8)
    y = dynamic_int8_linear(torch.zeros(2, 4), w, torch.ones(3), torch.ones(3))
    assert torch.equal(y, torch.ones(2, 3))


def test_static_int8_linear_is_onnx_arithmetic():
    """QuantizeLinear and MatMulInteger in integers; what lies off the grid is cut."""
    x, w = torch.randn(2, 4, 20) * 3, torch.randint(-127, 128, (20, 5), dtype=torch.int8)
    scale, bias = torch.rand(5), torch.randn(5)
    step, zero = np.float32(0.02), 100  # holds -2 to 3.1
    assert float(x.max()) > 3.1 and float(x.min()) < -2
    codes = np.clip(np.rint(x.numpy() / step) + zero, 0, 255).astype(np.int64)
    wanted = (codes - zero) @ w.numpy().astype(np.int64) * np.float64(step) * scale.numpy()
    grid = torch.tensor(step), torch.tensor(zero, dtype=torch.uint8)
    got = static_int8_linear(x, w, scale, *grid, bias).numpy()
    np.testing.assert_allclose(got, wanted + bias.numpy(), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(static_int8_linear, (x, w, scale, *grid, bias))


def test_token_int8_linear_rounds_each_token_by_its_largest_value():
    x, w = torch.randn(2, 4, 20) * 3, torch.randint(-127, 128, (20, 5), dtype=torch.int8)
    x[0, 1] *= 100  # an outlier of one token is nobody else's business
    scale, bias = torch.rand(5), torch.randn(5)
    wanted = torch.empty(2, 4, 5, dtype=torch.float64)
    for place in np.ndindex(2, 4):
        step = x[place].abs().max() / 127
        codes = (x[place] / step).round().double()
        wanted[place] = (codes @ w.double()) * step.double() * scale.double() + bias.double()
    got = token_int8_linear(x, w, scale, bias)
    assert torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-4)
    alone = token_int8_linear(x[1:], w, scale, bias)
    assert torch.equal(alone, got[1:])
    torch.library.opcheck(token_int8_linear, (x, w, scale, bias))
    zeros = token_int8_linear(torch.zeros(1, 20), w, scale, bias)
    assert torch.equal(zeros[0], bias)


def test_a_range_grid_holds_its_ends_and_zero():
    for low, high in ((-2.0, 3.0), (1.0, 4.0), (-3.0, -1.0), (0.0, 0.0)):
        step, zero = range_grid(torch.tensor(low), torch.tensor(high))
        codes = torch.tensor([min(low, 0.0), 0.0, max(high, 0.0)]).div(step).round() + zero
        assert codes.min() >= 0 and codes.max() <= 255 and codes[1] == zero
        assert low == high or float(codes.max() - codes.min()) >= 254
