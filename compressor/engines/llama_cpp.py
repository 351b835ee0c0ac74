"""llama.cpp on the CPU, through llama-cpp-python: decoders with its cache, and encoders.

Padded tokens are never seen by llama.cpp: a row is its real tokens, at positions from 0. Their
outputs are zeros here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.engines.gguf import FILE
from compressor.engines.llama_session import Session
from compressor.errors import CompressError
from compressor.model.checkpoint import read_pooling, read_task
from compressor.model.model import pool


@dataclass
class _Cache:
    """The real tokens of every row so far; llama.cpp holds their keys and values."""

    rows: list[list[int]]


class LlamaCppEngine:
    """An exported directory with model.gguf, run by llama.cpp.

    Args:
        path: the directory.
        threads: threads of llama.cpp; as many as torch uses when None.

    Raises:
        CompressError: llama-cpp-python is not installed, or llama.cpp cannot load the file.
    """

    name = "llama.cpp"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.path = Path(path)
        self._states = read_task(self.path) == "feature-extraction"
        self._pooling = read_pooling(self.path)
        if not (self.path / FILE).is_file():
            raise CompressError(f"'{self.path.name}' has no {FILE}", "export it again")
        threads = torch.get_num_threads() if threads is None else threads
        self.session = Session(self.path / FILE, threads, self._states)
        self._current: _Cache | None = None

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A full forward of every row by itself; see `Engine`."""
        self._current = None
        rows, mask = _real(batch)
        self.session.start(1, max(map(len, rows)))
        found = torch.zeros(*mask.shape, self.session.width)
        for number, tokens in enumerate(rows):
            self.session.start(1, len(tokens))
            found[number, mask[number]] = torch.from_numpy(self.session.run(0, tokens, 0))
        if not self._states:
            return {"logits": found}
        named = {"last_hidden_state": found}
        if self._pooling is not None:
            named["sentence_embedding"] = pool(found, mask.long(), self._pooling)
        return named

    def prefill(self, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Logits [B, S, V] of a left-padded prompt, and the cache that `decode` continues.

        Raises:
            CompressError: the model has no decoder.
        """
        if self._states:
            raise CompressError(
                f"'{self.path.name}' has no decoder with a head: it cannot generate",
                "use outputs(batch)",
            )
        rows, mask = _real(batch)
        cache = _Cache(rows)
        found = torch.zeros(*mask.shape, self.session.width)
        for number, logits in enumerate(self._feed(cache)):
            found[number, mask[number]] = logits
        return found, cache

    def decode(self, token: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits [B, 1, V] after one more token [B, 1]; the cache is changed in place."""
        past = [len(row) for row in cache.rows]
        for row, added in zip(cache.rows, token[:, 0].tolist(), strict=True):
            row.append(added)
        if cache is not self._current or max(past) >= self.session.length:
            return torch.stack([logits[-1:] for logits in self._feed(cache)]), cache
        found = [self.session.run(b, row[-1:], past[b]) for b, row in enumerate(cache.rows)]
        return torch.stack([torch.from_numpy(logits) for logits in found]), cache

    def _feed(self, cache: _Cache) -> list[Tensor]:
        """Logits [S, V] of each row, read from its first token into an empty context."""
        self.session.start(len(cache.rows), max(map(len, cache.rows)))
        self._current = cache
        return [torch.from_numpy(self.session.run(b, row, 0)) for b, row in enumerate(cache.rows)]

    def close(self) -> None:
        """Give the model back."""
        self.session.close()


def _real(batch: dict[str, Tensor]) -> tuple[list[list[int]], Tensor]:
    """The real tokens of every row, and where they stand [B, S]."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)], mask
