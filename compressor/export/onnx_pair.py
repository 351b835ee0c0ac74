"""Encoder-decoders as two graphs, so that the source is read once for any number of tokens.

encoder_model  input_ids, attention_mask, or input_features
               -> last_hidden_state, cross.L.key|value
decoder_model  decoder_input_ids, decoder_attention_mask [, decoder_position_ids]
               [, attention_mask], cross.L.key|value, past_key_values.L.key|value
               -> logits, present.L.key|value

cross.L is what decoder layer L attends to, [batch, heads, source, head_dim]: its key and value
projections of the encoder's output, which are the same at every step. attention_mask is that of
the source, for families whose sources are padded; decoder_position_ids exist where positions are
learned. past may be 0, as in onnx_forward.py.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.export.onnx_forward import (
    BEFORE,
    PAST,
    ROWS,
    Axes,
    Graph,
    cache_inputs,
    filled_cache,
    parts,
    token_inputs,
)
from compressor.model.model import Model

_SOURCE = 7  # tokens of the example's source
_TOKENS: Axes = {0: "batch", 1: "source"}
_CROSS: Axes = {0: "batch", 2: "source"}


class _Source(nn.Module):
    def __init__(self, model: Model, names: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.names = model.base.get_submodule("encoder"), names
        self.heads = model.sizes["heads"]
        stack = model.family.stacks[1]
        assert stack.cross_qkv is not None
        self.projections = nn.ModuleList(
            block.get_submodule(path)
            for block in model.blocks(stack)
            for path in stack.cross_qkv[1:]
        )

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        hidden = self.encoder(**dict(zip(self.names, tensors, strict=True))).last_hidden_state
        cross = [project(hidden) for project in self.projections]
        return hidden, *(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in cross)


class _Target(nn.Module):
    def __init__(self, model: Model, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = model.module, names

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        from transformers import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        given = dict(zip(self.names, tensors, strict=True))
        own, cross = filled_cache(given, "past_key_values"), filled_cache(given, "cross")
        cache = EncoderDecoderCache(own, cross)
        cache.is_updated = dict.fromkeys(range(len(cross.layers)), True)
        # with the cross cache full, only the shape of the encoder's output is looked at
        hidden = BaseModelOutput(last_hidden_state=cross.layers[0].keys[:, 0, :, :1])
        tokens = {name: t for name, t in given.items() if "." not in name}
        result = self.module(
            encoder_outputs=hidden, **tokens, past_key_values=cache, use_cache=True
        )
        present = (t for layer in own.layers for t in (layer.keys, layer.values))
        return result.logits, *present


def wrap_pair(model: Model) -> list[Graph]:
    """The graphs of an encoder-decoder.

    Raises:
        CompressError: it has no head, so that its decoder could not say anything.
    """
    if model.task == "feature-extraction":
        raise CompressError(
            f"this {model.family.model_type} has no head, so no text could be made with it",
            "use a checkpoint with its head (ForConditionalGeneration), or export.safetensors",
        )
    sizes = model.sizes
    layers, heads, width = sizes["decoder_layers"], sizes["heads"], sizes["head_dim"]
    source = _source(model)
    target = _target(model, source)
    target |= cache_inputs("cross", layers, heads, width, _SOURCE, _CROSS)
    target |= cache_inputs("past_key_values", layers, heads, width, BEFORE, PAST)
    encoder, decoder = _Source(model, list(source)), _Target(model, list(target))
    given = ["last_hidden_state", *parts("cross", layers)]
    made = ["logits", *parts("present", layers)]
    return [
        Graph("encoder_model.onnx", encoder.eval(), source, given),
        Graph("decoder_model.onnx", decoder.eval(), target, made),
    ]


def _source(model: Model) -> dict[str, tuple[Tensor, Axes]]:
    config = model.config
    if model.module.main_input_name == "input_features":  # two convolutions, one of stride 2
        shape = (ROWS, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": (torch.zeros(shape), {0: "batch"})}
    ids = torch.ones(ROWS, _SOURCE, dtype=torch.long)
    return {"input_ids": (ids, _TOKENS), "attention_mask": (ids.clone(), _TOKENS)}


def _target(model: Model, source: dict[str, tuple[Tensor, Axes]]) -> dict[str, tuple[Tensor, Axes]]:
    accepted = inspect.signature(type(model.module).forward).parameters
    found = {name: t for name, t in token_inputs("decoder_").items() if name in accepted}
    return found | {name: t for name, t in source.items() if name == "attention_mask"}
