"""One definition of "the outputs of a model", shared by the torch engine, probes and exporters."""

import inspect
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from compressor.model.model import Model, pool


@lru_cache
def _parameters(cls: type[nn.Module]) -> frozenset[str]:
    """Names of the arguments of a class's forward; asked for at every step of a training."""
    return frozenset(inspect.signature(cls.forward).parameters)


def accepted(model: Model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep only the keys that are tensors of this model's forward; labels are never passed.

    Positions of tokens that are generated count real tokens, wherever a row is padded: GPT-2 and
    Whisper by themselves would count the padding in front.
    """
    names = _parameters(type(model.module)) - {"labels"}
    given = {key: value for key, value in batch.items() if key in names}
    prefix = "decoder_" if len(model.family.stacks) > 1 else ""
    counted = prefix or model.task == "causal-lm"
    if counted and f"{prefix}position_ids" in names and f"{prefix}attention_mask" in given:
        found = positions(given[f"{prefix}attention_mask"])
        given.setdefault(f"{prefix}position_ids", found)
    return given


def positions(mask: Tensor) -> Tensor:
    """[B, S] position of each token among the real ones of its row, from an attention mask."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def without_cache(model: Model) -> dict[str, bool]:
    """The keyword that keeps a model with a decoder from filling a cache; else nothing.

    It is always given: the decoder of an encoder-decoder holds a config of its own, whose
    default would otherwise decide.
    """
    takes = "use_cache" in _parameters(type(model.module)) or model.task == "causal-lm"
    return {"use_cache": False} if takes else {}


@torch.no_grad()
def run_backbone(model: Model, batch: dict[str, Tensor]) -> None:
    """Run a forward without head and cache, for what hooks see of it."""
    model.base(**accepted(model, batch), **without_cache(model))


@torch.no_grad()
def outputs(model: Model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a full forward without cache.

    Returns float32 tensors: `logits` for models with a head, else `last_hidden_state` [B, S, H]
    and, with a pooling config, `sentence_embedding` [B, H]. The logits of an encoder-decoder
    belong to the tokens of its decoder.
    """
    result = model.module(**accepted(model, batch), **without_cache(model))
    if model.task != "feature-extraction":
        return {"logits": result.logits.float()}
    hidden = result.last_hidden_state.float()
    found = {"last_hidden_state": hidden}
    if model.pooling is not None:
        found["sentence_embedding"] = pool(hidden, batch["attention_mask"], model.pooling)
    return found


def output_mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    """[B, S] of the real positions of a batch's outputs; None where all are real (images)."""
    return batch.get("decoder_attention_mask", batch.get("attention_mask"))
