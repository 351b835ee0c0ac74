"""Float weights of a graph stored as float16: half the file, the same products.

Every weight gets a Cast to float32 behind it, which ONNX Runtime computes once, when it loads the
file. So speed and memory are those of the float32 file, and numbers too, but for the rounding of
weights to 11 bits; of a checkpoint in float16 there is none. Left alone is what is no parameter of
the model: codes and scales have their own form, and positions in float16 would be wrong ones.
"""

import hashlib
from typing import Any

import torch
from onnxscript import ir
from torch import Tensor, nn

from compressor.errors import CompressError


def store_half(program: Any, module: nn.Module) -> dict[str, int]:
    """Change an exported program in place.

    Args:
        program: what torch.onnx.export made of `module`.

    Returns:
        {weights, rounded}: how many tensors are stored so, and how many of them lost a bit.

    Raises:
        CompressError: a weight is too large for float16.
    """
    graph, known = program.model.graph, _digests(module)
    found = {"weights": 0, "rounded": 0}
    for value in list(graph.initializers.values()):
        array = value.const_value.numpy()
        if array.ndim < 2 or _digest(array) not in known:
            continue
        weight = torch.from_numpy(array)
        half = _half(weight)
        found["weights"] += 1
        found["rounded"] += not torch.equal(half.float(), weight)
        stored = ir.Value(name=f"{value.name}.float16", const_value=ir.tensor(half.numpy()))
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})
        del graph.initializers[value.name]
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        cast.outputs[0].name = value.name
        graph.register_initializer(stored)
        graph.insert_before(graph[0], cast)
    return found


def _half(weight: Tensor) -> Tensor:
    half = weight.half()
    if bool(torch.isinf(half).any()):
        raise CompressError(
            f"a weight of {float(weight.abs().max()):.0f} does not fit into float16",
            "leave dtype: float16 out of export.onnx",
        )
    return half


def _digests(module: nn.Module) -> set[bytes]:
    """Of all weights and of their transposes: the exporter turns those of Linears."""
    weights = [p.detach() for p in module.parameters() if p.dim() >= 2]
    turned = [w.t().contiguous() for w in weights if w.dim() == 2]
    return {_digest(w.numpy()) for w in (*weights, *turned)}


def _digest(array: Any) -> bytes:
    return hashlib.sha256(f"{array.shape} {array.dtype}".encode() + array.tobytes()).digest()
