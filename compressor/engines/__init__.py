"""Engines: what runs a model. Measures see only this, so torch and ONNX share their code."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Engine(Protocol):
    """A loaded model.

    `outputs` takes a batch (input_ids [B, S] int64, attention_mask [B, S] int64, optionally
    token_type_ids; other keys are ignored) and returns float32 tensors: encoders
    `last_hidden_state` [B, S, H] and, with a pooling config, `sentence_embedding` [B, H];
    classifiers and decoders `logits`.

    `prefill` runs a prompt and returns the logits of every position [B, S, V] with a cache;
    `decode` runs one more token [B, 1] on a cache. Encoders raise CompressError on both.
    """

    name: str  # "torch" | "onnxruntime"
    path: Path

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def prefill(self, batch: dict[str, Tensor]) -> tuple[Tensor, Any]: ...

    def decode(self, token: Tensor, cache: Any) -> tuple[Tensor, Any]: ...

    def close(self) -> None: ...
