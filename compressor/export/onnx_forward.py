"""The function that becomes the ONNX graph: flat named tensors in, flat named tensors out.

    encoder  input_ids, attention_mask [, token_type_ids] -> last_hidden_state
             [, sentence_embedding], or logits under a task head
    decoder  input_ids, attention_mask, position_ids, past_key_values.L.key|value
             -> logits, present.L.key|value            cache [batch, kv_heads, past, head_dim]

One graph serves prompts and single tokens: past may be 0. Rows may be padded on the left; then
attention_mask [batch, past + sequence] is 0 there and position_ids count real tokens only.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.model.model import Model, pool

_TOKENS = {0: "batch", 1: "sequence"}
_PAST = {0: "batch", 2: "past"}


@dataclass(frozen=True)
class Graph:
    """A wrapped model and what torch.onnx must know about it."""

    module: nn.Module
    inputs: list[str]
    outputs: list[str]
    example: tuple[Any, ...]
    axes: list[dict[int, str]]  # per input: which axes are free, and their names


class _Encoder(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.module, self.pooling = model.module, model.pooling
        self.bare = model.task == "feature-extraction"

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        result = self.module(input_ids=input_ids, attention_mask=attention_mask, **extra)
        if not self.bare:
            return (result.logits,)
        hidden = result.last_hidden_state
        if self.pooling is None:
            return (hidden,)
        return hidden, pool(hidden, attention_mask, self.pooling)


class _Decoder(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.module = model.module

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self.module.config)  # type: ignore[arg-type]
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        result = self.module(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return (result.logits, *present)


def wrap(model: Model) -> Graph:
    """Wrap a model (the exporter's twin) for its task, with a small example input."""
    return _wrap_decoder(model) if model.task == "causal-lm" else _wrap_encoder(model)


def _wrap_encoder(model: Model) -> Graph:
    names = ["input_ids", "attention_mask"]
    accepted = inspect.signature(type(model.module).forward).parameters
    if "token_type_ids" in accepted and "token_type_ids" in _tokenizer_outputs(model):
        names.append("token_type_ids")
    outputs = ["last_hidden_state"] if model.task == "feature-extraction" else ["logits"]
    if model.pooling is not None and outputs == ["last_hidden_state"]:
        outputs.append("sentence_embedding")
    ids = torch.ones(2, 3, dtype=torch.long)
    example = (ids, ids.clone(), torch.zeros_like(ids))[: len(names)]
    return Graph(_Encoder(model).eval(), names, outputs, example, [_TOKENS] * len(names))


def _tokenizer_outputs(model: Model) -> list[str]:
    return [] if model.processor is None else list(model.processor.model_input_names)


def _wrap_decoder(model: Model) -> Graph:
    parts = [f"{i}.{side}" for i in range(model.sizes["layers"]) for side in ("key", "value")]
    past = empty_cache(model, batch=2, length=5)
    ids = torch.ones(2, 3, dtype=torch.long)
    example = (ids, torch.ones(2, 8, dtype=torch.long), torch.arange(5, 8).repeat(2, 1), past)
    axes = [_TOKENS, {0: "batch", 1: "total"}, _TOKENS, *([_PAST] * len(parts))]
    return Graph(
        module=_Decoder(model).eval(),
        inputs=[
            *("input_ids", "attention_mask", "position_ids"),
            *(f"past_key_values.{part}" for part in parts),
        ],
        outputs=["logits", *(f"present.{part}" for part in parts)],
        example=example,
        axes=axes,
    )


def empty_cache(model: Model, batch: int, length: int = 0) -> list[Tensor]:
    """Key and value of every layer in turn, zeros [batch, kv_heads, length, head_dim]."""
    sizes = model.sizes
    shape = (batch, sizes["kv_heads"], length, sizes["head_dim"])
    return [torch.zeros(shape) for _ in range(2 * sizes["layers"])]
