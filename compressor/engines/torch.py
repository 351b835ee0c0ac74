"""PyTorch on the CPU: serves checkpoints and quantized models with our own modules.

Outputs come from model/forward.py, which probes and exporters share. With a cache, padding is on
the left, so the newest token is always the last column; position ids count real tokens only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from compressor.errors import CompressError
from compressor.model import forward
from compressor.model.checkpoint import load_directory
from compressor.model.manifest import WeightFormat
from compressor.model.model import Model

_SOURCE = ("input_ids", "input_features", "attention_mask")
GENERATES = ("causal-lm", "seq2seq-lm", "speech-seq2seq")  # tasks of models that write text


@dataclass
class _Cache:
    """Keys and values of all layers, and the mask [B, S] of the tokens they stand for."""

    past: Any
    mask: Tensor
    source: dict[str, Any]  # what an encoder-decoder is told of its source at every step


class TorchEngine:
    """A model in this process; see `Engine`.

    Args:
        path: a checkpoint or plain Hugging Face directory.
        threads: threads torch may use, for this whole process; None leaves them as they are.
        formats: see load_directory.

    Raises:
        CompressError: the directory holds no complete checkpoint.
    """

    name = "torch"
    path: Path
    model: Model

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        formats: dict[str, WeightFormat] | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.path, self.model = Path(path), load_directory(Path(path), formats)

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

        Of an encoder-decoder the prompt is decoder_input_ids [, decoder_attention_mask]; its
        source, input_ids and attention_mask or input_features, is read here, once.

        Raises:
            CompressError: the model has no decoder.
        """
        if self.model.task not in GENERATES:
            raise CompressError(
                f"'{self.path.name}' has no decoder with a head: it cannot generate",
                "use outputs(batch)",
            )
        ids = batch[f"{self._prefix}input_ids"]
        mask = batch.get(f"{self._prefix}attention_mask", torch.ones_like(ids))
        cache = _Cache(DynamicCache(), mask, self._read_source(batch))
        if self._prefix:
            cache.past = EncoderDecoderCache(cache.past, DynamicCache())
        return self._step(ids, forward.positions(mask), cache), cache

    def decode(self, token: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits [B, 1, V] after one more token [B, 1]; the cache is changed in place."""
        positions = cache.mask.sum(dim=1, keepdim=True)
        cache.mask = torch.cat([cache.mask, torch.ones_like(token)], dim=1)
        return self._step(token, positions, cache), cache

    @property
    def _prefix(self) -> str:
        return "decoder_" if len(self.model.family.stacks) > 1 else ""

    @torch.no_grad()
    def _read_source(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        if not self._prefix:
            return {}
        given = {name: batch[name] for name in _SOURCE if name in batch}
        encoded = self.model.base.get_submodule("encoder")(**given)
        kept = {name: mask for name, mask in given.items() if name == "attention_mask"}
        return kept | {"encoder_outputs": encoded}

    @torch.no_grad()
    def _step(self, ids: Tensor, positions: Tensor, cache: _Cache) -> Tensor:
        tokens = {"input_ids": ids, "attention_mask": cache.mask, "position_ids": positions}
        given = {f"{self._prefix}{name}": t for name, t in tokens.items()}
        result = self.model.module(
            **forward.accepted(self.model, given),
            **cache.source,
            past_key_values=cache.past,
            use_cache=True,
        )
        return result.logits.float()

    def close(self) -> None:
        """Let go of the model."""
        del self.model
