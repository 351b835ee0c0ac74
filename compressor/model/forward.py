"""One definition of "the outputs of a model", shared by the torch engine, probes and exporters."""

import inspect

import torch
from torch import Tensor

from compressor.model.model import Model, pool


def accepted(model: Model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep only the keys that are tensors of this model's forward; labels are never passed."""
    names = set(inspect.signature(type(model.module).forward).parameters) - {"labels"}
    return {key: value for key, value in batch.items() if key in names}


@torch.no_grad()
def outputs(model: Model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a full forward without cache.

    Returns float32 tensors: `logits` for models with a head, else `last_hidden_state` [B, S, H]
    and, with a pooling config, `sentence_embedding` [B, H].
    """
    extra = {"use_cache": False} if model.task == "causal-lm" else {}
    result = model.module(**accepted(model, batch), **extra)
    if model.task != "feature-extraction":
        return {"logits": result.logits.float()}
    hidden = result.last_hidden_state.float()
    found = {"last_hidden_state": hidden}
    if model.pooling is not None:
        found["sentence_embedding"] = pool(hidden, batch["attention_mask"], model.pooling)
    return found
