"""onnxruntime-genai on the CPU: a decoder's graph in the generate loop of that library.

It serves a directory with genai_config.json (export/genai.py) and keeps the cache itself. Rows are
generators of their own, without padding: the library would take every token that equals the
padding id for padding.
"""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.engines import refuse_missing
from compressor.errors import CompressError, first_line

CONFIG = "genai_config.json"
_GRAPH = "model.onnx"
_ERRORS_ONLY = 3  # log_severity_level
_ROOM = 2048  # tokens that may follow a prompt of `prefill`


def _stated(path: Path) -> dict[str, Any]:
    """What genai_config.json says of the model."""
    try:
        return dict(json.loads((path / CONFIG).read_text(encoding="utf-8"))["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise CompressError(
            f"{CONFIG} of '{path.name}' is damaged ({first_line(error)})", "export it again"
        ) from error


@dataclass
class _Cache:
    """A generator for every row; each holds its keys and values."""

    rows: list[Any]


class GenaiEngine:
    """A directory of export.genai, run by onnxruntime-genai.

    Args:
        path: directory with genai_config.json and the graph it names.
        threads: threads inside an operator; None leaves the choice to ONNX Runtime.
        exact: as for OnnxRuntimeEngine.

    Attributes:
        ends: ids of the tokens that end a text.

    Raises:
        CompressError: the library is not installed, or cannot load or run the directory.
    """

    name = "onnxruntime-genai"

    def __init__(self, path: Path, threads: int | None = None, exact: bool = False) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG).is_file():
            raise CompressError(
                f"'{self.path.name}' has no {CONFIG}",
                "make a directory that has one with compress export CHECKPOINT --to genai",
            )
        stated = _stated(self.path)
        last = stated.get("eos_token_id", [])
        self.ends: list[int] = last if isinstance(last, list) else [last]
        self._longest = int(stated.get("context_length", _ROOM))
        refuse_missing(self.name)
        self._og: Any = import_module("onnxruntime_genai")
        self._og.disable_telemetry_events()
        try:
            self._model = self._og.Model(self._config(threads, exact))
        except Exception as error:  # the library's errors are RuntimeError and what it wraps
            raise CompressError(
                f"onnxruntime-genai cannot load '{self.path.name}': {first_line(error)}",
                "export it again",
            ) from error
        finally:
            self._given = b""

    def _config(self, threads: int | None, exact: bool) -> Any:
        config = self._og.Config(str(self.path))
        session: dict[str, Any] = {
            "intra_op_num_threads": threads or 0,
            "log_severity_level": _ERRORS_ONLY,
            # as in onnx_session.py
            "session.intra_op.allow_spinning": "0",
        }
        if exact:
            from compressor.engines.onnx_session import float_activations

            session["session.model_external_initializers_file_folder_path"] = str(self.path)
            # the library keeps no copy: it reads these very bytes when it loads the model
            self._given = float_activations(self.path / _GRAPH)
            config.add_model_data(_GRAPH, self._given)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        return config

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logits [B, S, V] of whole rows, float32; 0 where a row is padded."""
        return {"logits": self.prefill(batch)[0]}

    def prefill(self, batch: dict[str, Tensor]) -> tuple[Tensor, _Cache]:
        """Logits [B, S, V] of prompts, which may be padded on either side, and their cache."""
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        cache = _Cache([self._generator(int(m.sum()) + _ROOM) for m in mask])
        found = [self._step(g, row[m]) for g, row, m in zip(cache.rows, ids, mask, strict=True)]
        logits = torch.zeros(*ids.shape, found[0].shape[-1])
        for row, keep, values in zip(logits, mask, found, strict=True):
            row[keep] = values
        return logits, cache

    def decode(self, token: Tensor, cache: _Cache) -> tuple[Tensor, _Cache]:
        """Logits [B, 1, V] of one more token [B, 1]; the cache is changed in place."""
        found = [self._step(g, row) for g, row in zip(cache.rows, token, strict=True)]
        return torch.stack(found), cache

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """Ids of at most `tokens` new tokens, from the library's own greedy loop.

        It ends where the library does: before an end-of-text token of genai_config.json.
        """
        generator = self._generator(len(prompt) + tokens)
        self._append(generator, np.array([prompt], dtype=np.int32))
        while not generator.is_done() and generator.token_count() < len(prompt) + tokens:
            generator.generate_next_token()
        return [int(i) for i in generator.get_sequence(0)][len(prompt) :]

    def encode(self, text: str) -> list[int] | None:
        """Ids of a text from the library's own tokenizer; None where it cannot read the files."""
        try:
            return [int(i) for i in self._og.Tokenizer(self._model).encode(text)]
        except RuntimeError:  # a kind of tokenizer that the library does not know
            return None

    def _generator(self, tokens: int) -> Any:
        """A row of at most so many tokens: its cache is made for all of them at once."""
        options = self._og.GeneratorParams(self._model)
        options.set_search_options(do_sample=False, num_beams=1, repetition_penalty=1.0)
        options.set_search_options(max_length=min(tokens, self._longest))
        return self._og.Generator(self._model, options)

    def _step(self, generator: Any, ids: Tensor) -> Tensor:
        """Logits [S, V] of new tokens [S] behind those of a generator."""
        self._append(generator, ids[None].numpy().astype(np.int32))
        return torch.from_numpy(np.array(generator.get_output("logits"))[0])

    def _append(self, generator: Any, ids: np.ndarray) -> None:
        """Run the graph on ids [1, S]; some kernels look at its shapes only now."""
        try:
            generator.append_tokens(ids)
        except RuntimeError as error:
            raise CompressError(
                f"onnxruntime-genai cannot run '{self.path.name}': {first_line(error)}",
                "choose another engine, or make the directory with compress export --to genai",
            ) from error

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""
        del self._model
