"""ONNX Runtime on the CPU, for encoders and for decoders with their KV cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime import InferenceSession, OrtValue
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    SessionOptions,
)
from torch import Tensor

from compressor.errors import CompressError

_FILE = "model.onnx"
_ERRORS_ONLY = 3  # log_severity_level
_PAST = "past_key_values."


@dataclass(frozen=True)
class Cache:
    """Keys and values of every token so far, owned by ONNX Runtime, and which tokens are real."""

    values: dict[str, OrtValue]  # past_key_values.L.key|value [batch, kv_heads, past, head_dim]
    mask: np.ndarray  # [batch, past] int64


class OnnxRuntimeEngine:
    """An exported directory, run by ONNX Runtime's CPU provider.

    Args:
        path: directory with model.onnx.
        threads: threads inside an operator; None leaves the choice to ONNX Runtime.
        exact: compute with float activations where the file asks for 8-bit ones. Slow; it shows
            that codes, scales and graph are right, apart from the rounding of activations.

    Raises:
        CompressError: model.onnx is missing, or ONNX Runtime cannot load it.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, threads: int | None = None, exact: bool = False) -> None:
        self.path = Path(path)
        file = self.path / _FILE
        if not file.is_file():
            raise CompressError(
                f"'{self.path.name}' has no {_FILE}", "name a directory that export.onnx wrote"
            )
        settings = SessionOptions()
        settings.log_severity_level = _ERRORS_ONLY
        settings.intra_op_num_threads = threads or 0
        # Idle threads that spin win nothing for one stream of requests and slow its neighbours.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = _load(_float_activations(file) if exact else str(file), file, settings)
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._past = [name for name in self._inputs if name.startswith(_PAST)]

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of a full forward, float32; keys the graph has no input for are ignored."""
        if self._past:
            return {"logits": self.prefill(batch)[0]}
        given = {name: t for name, t in batch.items() if name in self._inputs}
        if "token_type_ids" in self._inputs and "token_type_ids" not in given:
            given["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        feeds = {name: _array(t) for name, t in given.items()}
        found = self._session.run(self._outputs, feeds)
        return {name: torch.from_numpy(v) for name, v in zip(self._outputs, found, strict=True)}

    def prefill(self, batch: dict[str, Tensor]) -> tuple[Tensor, Cache]:
        """Logits [B, S, V] of a prompt, which may be padded on either side, and its cache."""
        self._need_cache()
        ids = _array(batch["input_ids"])
        mask = _array(batch["attention_mask"])
        empty = {}
        for name in self._past:
            _, heads, _, width = self._inputs[name].shape
            zeros = np.zeros((len(ids), heads, 0, width), np.float32)
            empty[name] = OrtValue.ortvalue_from_numpy(zeros)
        return self._step(ids, Cache(empty, mask[:, :0]), mask)

    def decode(self, token: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Logits [B, 1, V] of one more token [B, 1], and the cache that includes it."""
        self._need_cache()
        ids = _array(token)
        return self._step(ids, cache, np.ones_like(ids))

    def _step(self, ids: np.ndarray, cache: Cache, mask: np.ndarray) -> tuple[Tensor, Cache]:
        """Run new tokens after a cache; `mask` is theirs. The cache itself is never copied."""
        whole = np.concatenate([cache.mask, mask], axis=1)
        positions = (whole.cumsum(axis=1) - 1).clip(min=0)[:, -ids.shape[1] :]
        arrays = {"input_ids": ids, "attention_mask": whole, "position_ids": positions}
        feeds = {
            name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a))
            for name, a in arrays.items()
        }
        logits, *present = self._session.run_with_ort_values(self._outputs, feeds | cache.values)
        values = dict(zip(self._past, present, strict=True))
        return torch.from_numpy(logits.numpy()), Cache(values, whole)

    def _need_cache(self) -> None:
        if not self._past:
            raise CompressError(
                f"'{self.path.name}' is no decoder: it has no cache", "use `outputs`"
            )

    def close(self) -> None:
        """Free the session; the engine cannot be used afterwards."""
        del self._session


def _float_activations(file: Path) -> bytes:
    """The model with every MatMulNBits at accuracy_level 1; external data stays outside."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    return model.SerializeToString()


def _load(model: str | bytes, file: Path, settings: SessionOptions) -> InferenceSession:
    if isinstance(model, bytes):
        folder = "session.model_external_initializers_file_folder_path"
        settings.add_session_config_entry(folder, str(file.parent))
    try:
        return InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf) as error:
        raise CompressError(
            f"ONNX Runtime cannot load {file.name} of '{file.parent.name}': "
            f"{str(error).splitlines()[0]}",
            "export it again",
        ) from error


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()
