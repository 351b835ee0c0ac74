"""The functions that become ONNX graphs: named tensors in, named tensors out.

encoder  input_ids, attention_mask [, token_type_ids], or pixel_values
         -> last_hidden_state [, sentence_embedding], or logits under a task head
decoder  input_ids, attention_mask, position_ids, past_key_values.L.key|value
         -> logits, present.L.key|value            cache [batch, kv_heads, past, head_dim]
both     two graphs, see onnx_pair.py

One graph serves prompts and single tokens: past may be 0. Several tokens behind a past want a batch
of one row, or `attention: plain`. Rows may be padded on the left; then attention_mask
[batch, past + sequence] is 0 there and position_ids count real tokens only.
Layers with a sliding window keep all tokens in their cache too; the mask alone hides the rest.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.model.kv_cache import has_scales
from compressor.model.model import Model, pool

Axes = dict[int, str]  # which axes of an input are free, and their names
TOKENS: Axes = {0: "batch", 1: "sequence"}
PAST: Axes = {0: "batch", 2: "past"}
ROWS, LENGTH, BEFORE = 2, 3, 5  # sizes of the example: rows, tokens, tokens in the cache


@dataclass(frozen=True)
class Graph:
    """One file: a wrapped model and what torch.onnx must know about it.

    Attributes:
        module: takes one list of tensors, in the order of `inputs`.
        inputs: {name: (example, free axes)}.
    """

    file: str
    module: nn.Module
    inputs: dict[str, tuple[Tensor, Axes]]
    outputs: list[str]


class _Encoder(nn.Module):
    def __init__(self, model: Model, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.pooling, self.names = model.module, model.pooling, names
        self.bare = model.task == "feature-extraction"

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        result = self.module(**given)
        if not self.bare:
            return (result.logits,)
        hidden = result.last_hidden_state
        if self.pooling is None:
            return (hidden,)
        return hidden, pool(hidden, given["attention_mask"], self.pooling)


class _Decoder(nn.Module):
    def __init__(self, model: Model, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = model.module, names

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        tokens = {name: t for name, t in given.items() if "." not in name}
        with self._attention():
            cache = self._past(given, tokens)
            result = self.module(**tokens, past_key_values=cache, use_cache=True)
        return result.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values))

    def _attention(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _past(self, given: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> Any:
        return filled_cache(given, "past_key_values")


class _FusedDecoder(_Decoder):
    def _attention(self) -> AbstractContextManager[None]:
        from compressor.export.onnx_fused import fused

        return fused(self.module)

    def _past(self, given: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> Any:
        from compressor.export.onnx_fused import past

        before = [t for name, t in given.items() if name not in tokens]
        return past(before, tokens["input_ids"], tokens["attention_mask"])


def filled_cache(given: Mapping[str, Tensor], prefix: str) -> Any:
    """A cache of the tensors `prefix`.L.key|value, in the order of `given`."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()  # told nothing of the config, every layer keeps all tokens
    tensors = [t for name, t in given.items() if name.startswith(f"{prefix}.")]
    for layer in range(len(tensors) // 2):
        cache.update(tensors[2 * layer], tensors[2 * layer + 1], layer)
    return cache


def graphs(model: Model, fuses: bool = True) -> list[Graph]:
    """Wrap a model (the exporter's twin) for its task; encoder-decoders make two graphs.

    Args:
        fuses: whether a decoder gets the attention of ONNX Runtime (onnx_fused.py).
    """
    from compressor.export.onnx_pair import wrap_pair

    if len(model.family.stacks) > 1:
        return wrap_pair(model)
    if model.task == "causal-lm":
        return [_wrap_decoder(model, _FusedDecoder if fuses else _Decoder)]
    return [_wrap_encoder(model)]


def _wrap_encoder(model: Model) -> Graph:
    inputs = _pixels(model) if model.sizes["vocabulary"] == 0 else _text(model)
    outputs = ["last_hidden_state"] if model.task == "feature-extraction" else ["logits"]
    if model.pooling is not None and outputs == ["last_hidden_state"]:
        outputs.append("sentence_embedding")
    return Graph("model.onnx", _Encoder(model, list(inputs)).eval(), inputs, outputs)


def _pixels(model: Model) -> dict[str, tuple[Tensor, Axes]]:
    """Images of the one size that the position embeddings are made for."""
    size, channels = model.config.image_size, model.config.num_channels
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": (torch.zeros(ROWS, channels, height, width), {0: "batch"})}


def _text(model: Model) -> dict[str, tuple[Tensor, Axes]]:
    names = ["input_ids", "attention_mask"]
    accepted = inspect.signature(type(model.module).forward).parameters
    if "token_type_ids" in accepted and "token_type_ids" in _tokenizer_outputs(model):
        names.append("token_type_ids")
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
    examples = (ids, ids.clone(), torch.zeros_like(ids))
    return {name: (example, TOKENS) for name, example in zip(names, examples, strict=False)}


def _tokenizer_outputs(model: Model) -> list[str]:
    return [] if model.processor is None else list(model.processor.model_input_names)


def _wrap_decoder(model: Model, wrapper: type[_Decoder]) -> Graph:
    sizes = model.sizes
    inputs = token_inputs("") | cache_inputs(
        *("past_key_values", sizes["layers"], sizes["kv_heads"], sizes["head_dim"], BEFORE, PAST),
        dtype=torch.int8 if has_scales(model) else torch.float32,
    )
    outputs = ["logits", *parts("present", sizes["layers"])]
    return Graph("model.onnx", wrapper(model, list(inputs)).eval(), inputs, outputs)


def token_inputs(prefix: str) -> dict[str, tuple[Tensor, Axes]]:
    """input_ids, attention_mask and position_ids of tokens after a cache."""
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask = torch.ones(ROWS, BEFORE + LENGTH, dtype=torch.long)
    positions = torch.arange(BEFORE, BEFORE + LENGTH).repeat(ROWS, 1)
    return {
        f"{prefix}input_ids": (ids, TOKENS),
        f"{prefix}attention_mask": (mask, {0: "batch", 1: "total"}),
        f"{prefix}position_ids": (positions, TOKENS),
    }


def parts(prefix: str, layers: int) -> list[str]:
    """Names of the keys and values of all layers."""
    return [f"{prefix}.{i}.{side}" for i in range(layers) for side in ("key", "value")]


def cache_inputs(
    prefix: str,
    layers: int,
    heads: int,
    width: int,
    length: int,
    axes: Axes,
    dtype: torch.dtype = torch.float32,
) -> dict[str, tuple[Tensor, Axes]]:
    """Keys and values [batch, heads, length, width] of all layers."""
    example = torch.zeros(ROWS, heads, length, width, dtype=dtype)
    return {name: (example.clone(), axes) for name in parts(prefix, layers)}
