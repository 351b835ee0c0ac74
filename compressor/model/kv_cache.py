"""Keys and values of a decoder in 8 bits: what every token leaves in the cache of a layer.

    q = clip(round(x / s), -128, 127),   x ~ q s       s > 0: one for each channel of a head

A model with scales rounds keys (turned by their positions) and values wherever it attends, with a
cache or without, so that a prompt and its continuation see the same numbers. The scales lie beside
the weights in cache.safetensors: layers.L.key and layers.L.value, float32 [kv_heads, head_dim].

The attention around it is that of transformers, in its eager form.
"""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.beside import TensorFile
from compressor.model.model import Model
from compressor.model.sources import CACHE

METHOD = "quantize.cache"  # that fixes the scales
BITS = 8
_ATTENTION = "compress_rounded_cache"  # for transformers
_SIDES = ("key", "value")
_HINT = f"make the {METHOD} stage again"

Scales = tuple[Tensor, Tensor]  # of keys and of values, [kv_heads, head_dim]


def attentions(model: Model) -> list[Any]:
    """The attention module of every block of a decoder, in order."""
    stack = model.family.stacks[0]
    place = stack.qkv[0].rpartition(".")[0]
    return [block.get_submodule(place) for block in model.blocks(stack)]


def attach(model: Model, scales: Sequence[Scales]) -> None:
    """Round keys and values of every layer from now on."""
    for module, pair in zip(attentions(model), scales, strict=True):
        for side, scale_KD in zip(_SIDES, pair, strict=True):
            module.register_buffer(f"{side}_scale", scale_KD, persistent=False)
    _register()
    model.module.set_attn_implementation(_ATTENTION)  # type: ignore[operator]


def scales_of(module: nn.Module) -> Scales | None:
    """Those of an attention module."""
    found = getattr(module, "key_scale", None)
    return None if found is None else (found, module.value_scale)  # type: ignore[return-value]


def has_scales(model: Model) -> bool:
    """Whether keys and values of a model are rounded."""
    return any(scales_of(module) is not None for module in model.module.modules())


def rounded(x_BKSD: Tensor, scale_KD: Tensor) -> Tensor:
    """Keys or values [batch, kv_heads, tokens, head_dim] on their grid."""
    scale = scale_KD.unsqueeze(1)
    return (x_BKSD / scale).round().clamp(-128, 127) * scale


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **named: Any) -> Any:
    k, v = rounded(k, module.key_scale), rounded(v, module.value_scale)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, q, k, v, mask, **named)


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)


def bytes_per_token(sizes: dict[str, int]) -> dict[str, int]:
    """{float32, int8}: what a token takes in the cache of all layers."""
    numbers = 2 * sizes["layers"] * sizes["kv_heads"] * sizes["head_dim"]
    return {"float32": 4 * numbers, "int8": numbers}


def cache_facts(sizes: dict[str, int]) -> dict[str, Any]:
    """{bits, bytes_per_token}, for notes and manifests."""
    return {"bits": BITS, "bytes_per_token": bytes_per_token(sizes)}


def write_cache_scales(model: Model, directory: Path) -> None:
    """Write cache.safetensors where there are scales."""
    if not has_scales(model):
        return
    tensors = {
        f"layers.{i}.{side}": scale.detach().cpu()
        for i, module in enumerate(attentions(model))
        for side, scale in zip(_SIDES, scales_of(module) or (), strict=True)
    }
    TensorFile(tensors, {"holds": "scales of keys and values", "bits": BITS}).write(
        directory / CACHE
    )


def read_cache_scales(model: Model, directory: Path) -> None:
    """Attach what cache.safetensors holds; without one nothing is rounded.

    Raises:
        CompressError: the file is damaged, or of another model.
    """
    file = directory / CACHE
    if not file.is_file():
        return
    tensors, sizes = TensorFile.read(file).tensors, model.sizes
    wanted = {f"layers.{i}.{side}" for i in range(sizes["layers"]) for side in _SIDES}
    shape = (sizes["kv_heads"], sizes["head_dim"])
    fits = all(
        t.shape == shape and bool((t > 0).all() and t.isfinite().all()) for t in tensors.values()
    )
    if tensors.keys() != wanted or not fits:
        raise CompressError(f"{CACHE} of '{directory.name}' is not of its model", _HINT)
    attach(
        model,
        [
            (tensors[f"layers.{i}.key"], tensors[f"layers.{i}.value"])
            for i in range(sizes["layers"])
        ],
    )
