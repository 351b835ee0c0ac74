"""Operators on quantized weights. The body of each is the reference; it also is what runs here.

A kernel may register a faster implementation of the same schema for one device.
Legend: T tokens (any leading shape), I inputs, O outputs, G groups per row.
"""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import linear

from compressor.numerics.quantizer import dequantize


@custom_op("compress::quant_linear", mutates_args=())
def quant_linear(
    x_TI: Tensor, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, bias_O: Tensor | None
) -> Tensor:
    """Weight-only: x @ ((code - zero) * scale)^T + bias, float32 throughout.

    The float weight lives only for the length of the call.
    """
    return linear(x_TI, dequantize(codes_OI, scale_OG, zero_OG).to(x_TI.dtype), bias_O)


@quant_linear.register_fake
def _(
    x_TI: Tensor, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, bias_O: Tensor | None
) -> Tensor:
    return x_TI.new_empty((*x_TI.shape[:-1], codes_OI.shape[0]))


@custom_op("compress::dynamic_int8_linear", mutates_args=())
def dynamic_int8_linear(
    x_TI: Tensor, w_IO: Tensor, scale_O: Tensor, bias_O: Tensor | None
) -> Tensor:
    """8-bit weights times activations rounded to 8 bits by the range of this very call.

        s = (max(x, 0) - min(x, 0)) / 255,  z = round(-min(x, 0) / s),  q = round(x / s) + z
        y = ((q - z) @ w) * s * scale + bias

    the arithmetic of ONNX's DynamicQuantizeLinear and MatMulInteger. One (s, z) serves the whole
    tensor, so a row's result depends on its neighbours in the batch.

    Args:
        x_TI: float32. w_IO: int8, inputs first as ONNX wants it. scale_O, bias_O: float32.
    """
    low, high = x_TI.amin().clamp(max=0), x_TI.amax().clamp(min=0)
    step = (high - low) / 255
    step = torch.where(step == 0, torch.ones_like(step), step)
    zero = (-low / step).round()
    q_TI = ((x_TI / step).round() + zero).clamp(0, 255) - zero
    y_TO = (q_TI @ w_IO.to(x_TI.dtype)) * (step * scale_O)
    return y_TO if bias_O is None else y_TO + bias_O


@dynamic_int8_linear.register_fake
def _(x_TI: Tensor, w_IO: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty((*x_TI.shape[:-1], w_IO.shape[1]))


OPS = ("quant_linear", "dynamic_int8_linear")
