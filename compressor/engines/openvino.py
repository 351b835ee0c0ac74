"""OpenVINO on the CPU: our ONNX directories, or OpenVINO's own files (model.xml, model.bin).

OpenVINO reads the graph of export.onnx as it is, our codes and all. Products stay float32
(INFERENCE_PRECISION_HINT): left alone it would take bfloat16 where the processor has it, and the
same file would give other numbers on another machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.engines import refuse_missing
from compressor.engines.onnx_files import refusal
from compressor.engines.onnxruntime import Cache, OnnxRuntimeEngine
from compressor.errors import CompressError, first_line


class OpenVinoEngine(OnnxRuntimeEngine):
    """An exported directory, run by OpenVINO's CPU plugin.

    Args:
        path: directory with model.onnx, or encoder_model.onnx and decoder_model.onnx, or the same
            names ending in .xml with inputs and outputs called as in docs/formats.md.
        threads: threads of inference; None leaves the choice to OpenVINO.

    Raises:
        CompressError: the library is not installed, a graph is missing, or it cannot load one.
    """

    name = "openvino"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        refuse_missing(self.name)
        self._open(Path(path), lambda file: _Session(file, threads))

    def _step(self, ids: np.ndarray, cache: Cache, mask: np.ndarray) -> tuple[Tensor, Cache]:
        """Row by row where it must be: OpenVINO 2026.4 has GroupQueryAttention of one row only."""
        if len(ids) == 1 or not self._main.one_row:
            return super()._step(ids, cache, mask)
        rows = [
            super(OpenVinoEngine, self)._step(ids[i : i + 1], _row(cache, i), mask[i : i + 1])
            for i in range(len(ids))
        ]
        values = {
            name: _Value(np.concatenate([own.values[name].numpy() for _, own in rows]))
            for name in cache.values
        }
        whole = np.concatenate([own.mask for _, own in rows])
        return torch.cat([logits for logits, _ in rows]), replace(cache, values=values, mask=whole)


def _row(cache: Cache, i: int) -> Cache:
    """The cache of one row of a decoder."""
    values: dict[str, Any] = {n: _Value(v.numpy()[i : i + 1]) for n, v in cache.values.items()}
    return replace(cache, values=values, mask=cache.mask[i : i + 1])


@dataclass(frozen=True)
class _Value:
    """An array under the name that engines call."""

    array: np.ndarray

    def numpy(self) -> np.ndarray:
        return self.array


class _Session:
    """A compiled graph with the face of onnx_session.Session."""

    def __init__(self, file: Path, threads: int | None) -> None:
        found = file if file.is_file() else file.with_suffix(".xml")
        if not found.is_file():
            raise CompressError(
                f"'{file.parent.name}' has no {file.name} and no {found.name}",
                "name a directory of export.onnx or of OpenVINO",
            )
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            library = import_module("openvino")
            core = library.Core()
            read = core.read_model(str(found))
            kinds = {node.get_type_name() for node in read.get_ops()}
            self._compiled = core.compile_model(read, "CPU", settings)
        except RuntimeError as error:
            said = RuntimeError(_reason(error))
            raise refusal(found, said, "OpenVINO", library.__version__) from error
        self.one_row = "GroupQueryAttention" in kinds
        self._request = self._compiled.create_infer_request()
        self.inputs = {i.any_name: _shape(i) for i in self._compiled.inputs}
        self.types = {i.any_name: i.element_type.to_dtype() for i in self._compiled.inputs}
        self.outputs = [o.any_name for o in self._compiled.outputs]

    def value(self, array: np.ndarray) -> _Value:
        """As in Session."""
        return _Value(array)

    def run(
        self, feeds: Mapping[str, _Value], outputs: Sequence[str] | None = None
    ) -> dict[str, _Value]:
        """As in Session; results are copies, since the next run writes over the plugin's own."""
        given = {name: value.array for name, value in feeds.items()}
        found = self._request.infer(given, share_inputs=True, share_outputs=False)
        return {name: _Value(found[name]) for name in outputs or self.outputs}


def _shape(port: Any) -> list[int | str]:
    """Sizes of an input; a free axis is its place."""
    axes = enumerate(port.partial_shape)
    return [axis.get_length() if axis.is_static else f"axis {i}" for i, axis in axes]


def _reason(error: Exception) -> str:
    """The line of OpenVINO's message that says something: the first only names a source file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Exception from" not in line and "Check '" not in line]
    return telling[0] if telling else first_line(error)
