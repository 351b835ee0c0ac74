"""The quantized operators of ONNX Runtime: in torch a reference, under torch.onnx the node itself.

The exporter's twin modules call these functions. While torch.onnx traces, each puts exactly one
known node (or chain) into the graph, so our codes reach the file bit for bit and no pattern has
to be recognized afterwards. At any other time each computes in torch what the node computes.

Legend: T tokens (any leading shape), K inputs, N outputs, G blocks of b inputs, P packed bytes of
a block. K may end inside the last block; what pads it is never used.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.onnx import is_in_onnx_export
from torch.onnx.ops import symbolic, symbolic_multi_out

from compressor.numerics.ops import (
    SMALLEST_STEP,
    dynamic_int8_linear,
    static_int8_linear,
    token_int8_linear,
)
from compressor.numerics.packing import unpack
from compressor.numerics.quantizer import dequantize

# accuracy_level of MatMulNBits; with int8 activations it is several times faster
_INT8_ACTIVATIONS, _FLOAT_ACTIVATIONS = 4, 1


def matmul_nbits(
    x_TK: Tensor,
    packed_NGP: Tensor,
    scale_NG: Tensor,
    zero: Tensor | None,
    bias_N: Tensor | None,
    bits: int,
    rounds: bool = True,
) -> Tensor:
    """com.microsoft.MatMulNBits with accuracy_level 4: activations are rounded to 8 bits too.

        s = max|x_b| / 127 for every block of b inputs,  q = round(x_b / s)
        y = (q * s) @ ((code - zero) * scale)^T + bias

    Args:
        x_TK: float32. packed_NGP: uint8. scale_NG, bias_N: float32.
        zero: packed zero points, uint8 [N, ceil(G * bits / 8)]; None means 2^(bits-1).
        bits: 2, 4 or 8.
        rounds: false for accuracy_level 1, which leaves activations float.
    """
    count, groups, size = packed_NGP.shape
    inputs, block = x_TK.shape[-1], size * 8 // bits
    if is_in_onnx_export():
        return symbolic(
            "com.microsoft::MatMulNBits",
            _trimmed(x_TK, packed_NGP, scale_NG, zero, None, bias_N),
            {
                "K": inputs,
                "N": count,
                "bits": bits,
                "block_size": block,
                "accuracy_level": _INT8_ACTIVATIONS if rounds else _FLOAT_ACTIVATIONS,
            },
            dtype=x_TK.dtype,
            shape=(*x_TK.shape[:-1], count),
            version=1,
        )
    x_TGb = pad(x_TK, (0, groups * block - inputs)).unflatten(-1, (groups, block))
    step_TG1 = x_TGb.abs().amax(-1, keepdim=True) / 127
    step_TG1 = step_TG1.masked_fill(step_TG1 == 0, 1.0)
    rounded_TK = ((x_TGb / step_TG1).round() * step_TG1).flatten(-2)[..., :inputs]
    rounded_TK = rounded_TK if rounds else x_TK
    middle = torch.full_like(scale_NG, 2 ** (bits - 1), dtype=torch.uint8)
    zero_NG = middle if zero is None else unpack(zero, bits, groups)
    codes_NK = unpack(packed_NGP, bits, block).flatten(1)
    return linear(rounded_TK, dequantize(codes_NK, scale_NG, zero_NG)[:, :inputs], bias_N)


def gather_block_quantized(
    ids: Tensor, packed_NGP: Tensor, scale_NG1: Tensor, zero: Tensor | None, bits: int
) -> Tensor:
    """com.microsoft.GatherBlockQuantized on a table of blocks: ids [...] -> float32 [..., G, b].

    The table has the layout of MatMulNBits, so that a tied head uses the very same tensor.
    `zero` is packed along its last axis, uint8 [N, G, 1]; None means 2^(bits-1).
    """
    _, groups, size = packed_NGP.shape
    block = size * 8 // bits
    if is_in_onnx_export():
        return symbolic(
            "com.microsoft::GatherBlockQuantized",
            _trimmed(packed_NGP, ids, scale_NG1, zero),
            {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 2},
            dtype=scale_NG1.dtype,
            shape=(*ids.shape, groups, block),
            version=1,
        )
    scale = scale_NG1[ids]
    middle = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    return dequantize(
        unpack(packed_NGP[ids], bits, block), scale, middle if zero is None else zero[ids]
    )


def dynamic_int8(x_TI: Tensor, w_IO: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """`dynamic_int8_linear` as the chain that ONNX Runtime fuses into DynamicQuantizeMatMul."""
    if not is_in_onnx_export():
        return dynamic_int8_linear(x_TI, w_IO, scale_O, bias_O)
    codes, step, zero = symbolic_multi_out(
        "::DynamicQuantizeLinear",
        (x_TI,),
        dtypes=(torch.uint8, torch.float32, torch.uint8),
        shapes=(x_TI.shape, (), ()),
    )
    return _int8_product(codes, w_IO, zero, step, scale_O, bias_O)


def static_int8(
    x_TI: Tensor,
    w_IO: Tensor,
    scale_O: Tensor,
    input_scale: Tensor,
    input_zero: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """`static_int8_linear` as a product between DequantizeLinear nodes (QDQ).

    Engines fuse these into one integer product with the same codes. In ONNX Runtime it is as fast
    as MatMulInteger, which OpenVINO runs at the speed of floats (docs/results/engines.md).
    """
    if not is_in_onnx_export():
        return static_int8_linear(x_TI, w_IO, scale_O, input_scale, input_zero, bias_O)
    codes = _quantize_linear(x_TI, input_scale, input_zero)
    rounded_TI = _dequantize_linear(codes, input_scale, input_zero)
    y = rounded_TI @ _dequantize_linear(w_IO, scale_O, None)
    return y if bias_O is None else y + bias_O


def token_int8(
    x_TI: Tensor,
    w_IO: Tensor,
    scale_O: Tensor,
    one: Tensor,
    middle: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """`token_int8_linear`: a token is divided by its step, then QuantizeLinear and MatMulInteger.

    Codes are unsigned around 128: with signed ones ONNX Runtime's product is 10 to 90 times slower.

    Args:
        one, middle: 1 in float32 and 128 in uint8, scalars: the grid of what was divided.
    """
    if not is_in_onnx_export():
        return token_int8_linear(x_TI, w_IO, scale_O, bias_O)
    step_T1 = (x_TI.abs().amax(-1, keepdim=True) / 127).clamp(min=SMALLEST_STEP)
    codes = _quantize_linear(x_TI / step_T1, one, middle)
    return _int8_product(codes, w_IO, middle, step_T1, scale_O, bias_O)


def _quantize_linear(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return symbolic("::QuantizeLinear", (x, scale, zero), dtype=torch.uint8, shape=x.shape)


def _dequantize_linear(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """With one scale for all codes, or one for each of the last axis."""
    return symbolic(
        "::DequantizeLinear",
        _trimmed(codes, scale, zero),
        {"axis": codes.dim() - 1},
        dtype=scale.dtype,
        shape=codes.shape,
    )


def _int8_product(
    codes_TI: Tensor,
    w_IO: Tensor,
    zero: Tensor,
    step: Tensor,
    scale_O: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """((codes - zero) @ w) * step * scale + bias, in integers up to the first product."""
    sums = symbolic(
        "::MatMulInteger",
        (codes_TI, w_IO, zero),
        dtype=torch.int32,
        shape=(*codes_TI.shape[:-1], w_IO.shape[1]),
    ).float()
    # one step for all goes to the scales first, and one a token to the tokens: fewest products
    y = sums * step * scale_O if step.dim() else sums * (step * scale_O)
    return y if bias_O is None else y + bias_O


def _trimmed(*inputs: Tensor | None) -> list[Tensor | None]:
    """Inputs of a node without the absent ones at its end."""
    found = list(inputs)
    while found[-1] is None:
        found.pop()
    return found
