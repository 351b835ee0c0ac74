"""PyTorch on the CPU: serves checkpoints and quantized models with our own modules.

Outputs come from model/forward.py, which probes and exporters share. With a cache, padding is on
the left, so the newest token is always the last column; position ids count real tokens only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from compressor.errors import CompressError
from compressor.model import forward
from compressor.model.checkpoint import load_directory
from compressor.model.model import Model


@dataclass
class _Cache:
    """Keys and values of all layers, and the mask [B, S] of the tokens they stand for."""

    past: DynamicCache
    mask: Tensor


class TorchEngine:
    """A model in this process; see `Engine`.

    Args:
        path: a checkpoint or plain Hugging Face directory.
        threads: threads torch may use, for this whole process; None leaves them as they are.

    Raises:
        CompressError: the directory holds no complete checkpoint.
    """

    name = "torch"
    path: Path
    model: Model

    def __init__(self, path: Path, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.path, self.model = Path(path), load_directory(Path(path))

    @classmethod
    def of(cls, model: Model, path: Path) -> "TorchEngine":
        """An engine over a model that is already in memory; `path` is where it came from."""
        engine = cls.__new__(cls)
        engine.path, engine.model = Path(path), model
        return engine

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A full forward without cache; see `Engine`."""
        return forward.outputs(self.model, batch)

    def prefill(self, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Logits [B, S, V] of a left-padded prompt, and the cache that `decode` continues.

        Raises:
            CompressError: the model is no causal language model.
        """
        if self.model.task != "causal-lm":
            raise CompressError(
                f"'{self.path.name}' is no causal language model: it cannot generate",
                "use outputs(batch)",
            )
        mask = batch["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = _Cache(DynamicCache(), mask)
        return self._step(batch["input_ids"], positions, cache), cache

    def decode(self, token: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits [B, 1, V] after one more token [B, 1]; the cache is changed in place."""
        positions = cache.mask.sum(dim=1, keepdim=True)
        cache.mask = torch.cat([cache.mask, torch.ones_like(token)], dim=1)
        return self._step(token, positions, cache), cache

    @torch.no_grad()
    def _step(self, ids: Tensor, positions: Tensor, cache: _Cache) -> Tensor:
        result = self.model.module(
            input_ids=ids,
            attention_mask=cache.mask,
            position_ids=positions,
            past_key_values=cache.past,
            use_cache=True,
        )
        return result.logits.float()

    def close(self) -> None:
        """Let go of the model."""
        del self.model
