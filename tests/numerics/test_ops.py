"""The operators against plain formulas, and against torch's own rules for custom operators."""

import numpy as np
import torch

from compressor.numerics.ops import dynamic_int8_linear, quant_linear
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
