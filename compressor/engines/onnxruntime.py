"""ONNX Runtime: encoders, decoders with their KV cache, and encoder-decoders.

An encoder-decoder is two graphs (export/onnx_pair.py): the encoder runs once for a source and
leaves the keys and values of cross attention, which every step of the decoder then takes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.engines.onnx_session import CPU, Session, Value
from compressor.errors import CompressError

_ONE, _ENCODER, _DECODER = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"
_PAST, _CROSS = "past_key_values.", "cross."


@dataclass(frozen=True)
class Cache:
    """Keys and values of every token so far, owned by the engine, and which tokens are real."""

    values: dict[str, Value]  # past_key_values.L.key|value [batch, kv_heads, past, head_dim]
    mask: np.ndarray  # [batch, past] int64
    source: dict[str, Value]  # cross.L.key|value and the source's mask; empty for decoders


class OnnxRuntimeEngine:
    """An exported directory, run by a provider of ONNX Runtime.

    Args:
        path: directory with model.onnx, or with encoder_model.onnx and decoder_model.onnx.
        threads: threads inside an operator; None leaves the choice to ONNX Runtime.
        exact: compute with float activations where the file asks for 8-bit ones. Slow; it shows
            that codes, scales and graph are right, apart from the rounding of activations.
        provider: what runs the operators; those it does not know run on the CPU.

    Raises:
        CompressError: a graph is missing, or ONNX Runtime cannot load it.
    """

    name = "onnxruntime"

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        exact: bool = False,
        provider: str = CPU,
    ) -> None:
        self._open(Path(path), lambda file: Session(file, threads, exact, provider))

    def _open(self, path: Path, load: Callable[[Path], Any]) -> None:
        """Load the graphs of a directory."""
        self.path = path
        self._encoder, main = None, path / _ONE
        if (path / _ENCODER).is_file():
            self._encoder = load(path / _ENCODER)
            main = path / _DECODER
        self._main = load(main)
        self._past = [name for name in self._main.inputs if name.startswith(_PAST)]
        self._prefix = "decoder_" if self._encoder else ""

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of a full forward, float32; keys the graph has no input for are ignored."""
        if self._past:
            return {self._main.outputs[0]: self.prefill(batch)[0]}
        found = self._main.run(_given(batch, self._main))
        return {name: _tensor(value) for name, value in found.items()}

    def prefill(self, batch: dict[str, Tensor]) -> tuple[Tensor, Cache]:
        """Logits [B, S, V] of a prompt, which may be padded on either side, and its cache.

        Of an encoder-decoder the prompt is decoder_input_ids [, decoder_attention_mask]; its
        source, input_ids and attention_mask or input_features, is read here, once.
        """
        self._need_cache()
        ids = _array(batch[f"{self._prefix}input_ids"])
        given = batch.get(f"{self._prefix}attention_mask")
        mask = np.ones_like(ids) if given is None else _array(given)
        empty = {}
        for name in self._past:
            _, heads, _, width = self._main.inputs[name]
            zeros = np.zeros((len(ids), heads, 0, width), self._main.types[name])
            empty[name] = self._main.value(zeros)
        return self._step(ids, Cache(empty, mask[:, :0], self._read_source(batch)), mask)

    def decode(self, token: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Logits [B, 1, V] of one more token [B, 1], and the cache that includes it."""
        self._need_cache()
        ids = _array(token)
        return self._step(ids, cache, np.ones_like(ids))

    def _read_source(self, batch: dict[str, Tensor]) -> dict[str, Value]:
        if self._encoder is None:
            return {}
        given = _given(batch, self._encoder)
        wanted = [name for name in self._encoder.outputs if name.startswith(_CROSS)]
        kept = {name: v for name, v in given.items() if name in self._main.inputs}
        return kept | self._encoder.run(given, wanted)

    def _step(self, ids: np.ndarray, cache: Cache, mask: np.ndarray) -> tuple[Tensor, Cache]:
        """Run new tokens after a cache; `mask` is theirs. The cache itself is never copied."""
        whole = np.concatenate([cache.mask, mask], axis=1)
        positions = (whole.cumsum(axis=1) - 1).clip(min=0)[:, -ids.shape[1] :]
        arrays = {"input_ids": ids, "attention_mask": whole, "position_ids": positions}
        feeds = {
            f"{self._prefix}{name}": self._main.value(np.ascontiguousarray(a))
            for name, a in arrays.items()
            if f"{self._prefix}{name}" in self._main.inputs
        }
        logits, *present = self._main.run(feeds | cache.source | cache.values).values()
        values = dict(zip(self._past, present, strict=True))
        return _tensor(logits), replace(cache, values=values, mask=whole)

    def _need_cache(self) -> None:
        if not self._past:
            raise CompressError(
                f"'{self.path.name}' is no decoder: it has no cache", "use `outputs`"
            )

    def close(self) -> None:
        """Free the sessions; the engine cannot be used afterwards."""
        del self._main, self._encoder


def _given(batch: dict[str, Tensor], graph: Any) -> dict[str, Value]:
    """The inputs of a graph that reads whole rows; masks and token types may be left out."""
    found = {name: t for name, t in batch.items() if name in graph.inputs}
    if "token_type_ids" in graph.inputs:
        found.setdefault("token_type_ids", torch.zeros_like(batch["input_ids"]))
    if "attention_mask" in graph.inputs:
        found.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    return {name: graph.value(_array(t)) for name, t in found.items()}


def _array(tensor: Tensor) -> Any:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def _tensor(value: Value) -> Tensor:
    return torch.from_numpy(value.numpy())
