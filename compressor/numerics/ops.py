"""Operators on quantized weights. The body of each is the reference; it also is what runs here.

A kernel may register a faster implementation of the same schema for one device.
Legend: T tokens (any leading shape), I inputs, O outputs, G groups per row.
"""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import linear

from compressor.numerics.quantizer import dequantize

SMALLEST_STEP = 1e-30  # of a token's grid; a token of zeros stays zeros


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
    step, zero = range_grid(x_TI.amin(), x_TI.amax())
    q_TI = ((x_TI / step).round() + zero).clamp(0, 255) - zero
    y_TO = (q_TI @ w_IO.to(x_TI.dtype)) * (step * scale_O)
    return y_TO if bias_O is None else y_TO + bias_O


@dynamic_int8_linear.register_fake
def _(x_TI: Tensor, w_IO: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty((*x_TI.shape[:-1], w_IO.shape[1]))


def range_grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The 8-bit grid of a range that is made to hold zero: (step, zero), both float32 scalars."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low) / 255
    step = torch.where(step == 0, torch.ones_like(step), step)
    return step, (-low / step).round()


@custom_op("compress::static_int8_linear", mutates_args=())
def static_int8_linear(
    x_TI: Tensor,
    w_IO: Tensor,
    scale_O: Tensor,
    input_scale: Tensor,
    input_zero: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """8-bit weights times activations rounded to a grid that was chosen before.

        q = clip(round(x / s) + z, 0, 255),  y = ((q - z) @ w) * s * scale + bias

    the arithmetic of ONNX's QuantizeLinear and MatMulInteger; what lies outside the grid is cut.

    Args:
        x_TI: float32. w_IO: int8, inputs first. scale_O, bias_O: float32.
        input_scale, input_zero: s float32 and z uint8, scalars.
    """
    zero = input_zero.to(x_TI.dtype)
    q_TI = ((x_TI / input_scale).round() + zero).clamp(0, 255) - zero
    y_TO = (q_TI @ w_IO.to(x_TI.dtype)) * (input_scale * scale_O)
    return y_TO if bias_O is None else y_TO + bias_O


@static_int8_linear.register_fake
def _(
    x_TI: Tensor,
    w_IO: Tensor,
    scale_O: Tensor,
    input_scale: Tensor,
    input_zero: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    return x_TI.new_empty((*x_TI.shape[:-1], w_IO.shape[1]))


@custom_op("compress::token_int8_linear", mutates_args=())
def token_int8_linear(x_TI: Tensor, w_IO: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """8-bit weights times activations rounded to 8 bits, each token by its own largest value.

        s_t = max|x_t| / 127,  q_t = round(x_t / s_t),  y_t = (q_t @ w) * s_t * scale + bias

    No token's result depends on another's.

    Args:
        x_TI: float32. w_IO: int8, inputs first. scale_O, bias_O: float32.
    """
    step_T1 = (x_TI.abs().amax(-1, keepdim=True) / 127).clamp(min=SMALLEST_STEP)
    y_TO = ((x_TI / step_T1).round() @ w_IO.to(x_TI.dtype)) * step_T1 * scale_O
    return y_TO if bias_O is None else y_TO + bias_O


@token_int8_linear.register_fake
def _(x_TI: Tensor, w_IO: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty((*x_TI.shape[:-1], w_IO.shape[1]))


OPS = ("quant_linear", "dynamic_int8_linear", "static_int8_linear", "token_int8_linear")
