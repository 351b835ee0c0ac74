"""One ONNX graph, loaded by ONNX Runtime."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from onnxruntime import InferenceSession, OrtValue
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NoSuchFile,
    NotImplemented,
    RuntimeException,
    SessionOptions,
    get_available_providers,
)

from compressor.engines.onnx_files import refusal
from compressor.errors import CompressError

CPU = "CPUExecutionProvider"
_FAILURES = (
    *(Fail, InvalidArgument, InvalidGraph, InvalidProtobuf),
    *(NoSuchFile, NotImplemented, RuntimeException),
)
_ERRORS_ONLY = 3  # log_severity_level
_TYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


class Value(Protocol):
    """A tensor where its engine keeps it."""

    def numpy(self) -> np.ndarray: ...


class Session:
    """A loaded file.

    Args:
        file: a graph.
        threads: threads inside an operator; None leaves the choice to ONNX Runtime.
        exact: see OnnxRuntimeEngine.
        provider: the execution provider; what it does not know runs on the CPU.

    Attributes:
        inputs: {name: shape}; a free axis is its name.
        types: {name: dtype} of the inputs that are numbers, not ids: float32, or int8 of a cache.
        outputs: names.

    Raises:
        CompressError: the file or the provider is missing, or ONNX Runtime cannot load it.
    """

    def __init__(
        self, file: Path, threads: int | None = None, exact: bool = False, provider: str = CPU
    ) -> None:
        if not file.is_file():
            raise CompressError(
                f"'{file.parent.name}' has no {file.name}", "name a directory of export.onnx"
            )
        settings = SessionOptions()
        settings.log_severity_level = _ERRORS_ONLY
        settings.intra_op_num_threads = threads or 0
        # Idle threads that spin win nothing for one stream of requests and slow its neighbours.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = float_activations(file) if exact else str(file)
        self._session = _load(model, file, settings, provider)
        self.inputs: dict[str, list[Any]] = {i.name: i.shape for i in self._session.get_inputs()}
        self.types = {
            i.name: _TYPES[i.type] for i in self._session.get_inputs() if i.type in _TYPES
        }
        self.outputs = [o.name for o in self._session.get_outputs()]

    def value(self, array: np.ndarray) -> OrtValue:
        """An array as `run` takes it."""
        return OrtValue.ortvalue_from_numpy(array)

    def run(
        self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None
    ) -> dict[str, OrtValue]:
        """Run the graph for all outputs, or for those named, in their order."""
        names = list(outputs or self.outputs)
        return dict(zip(names, self._session.run_with_ort_values(names, dict(feeds)), strict=True))


def float_activations(file: Path) -> bytes:
    """The model with float activations; external data stays outside.

    Every MatMulNBits gets accuracy_level 1, and integer products become float ones of the inputs
    over their steps, not rounded. A cache in 8 bits stays one.
    """
    import onnx

    model = onnx.load(file, load_external_data=False)
    nodes = []
    rounded = {n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
        nodes.extend(_without_rounding(node, rounded))
    del model.graph.node[:], model.graph.value_info[:]  # which tell the types of codes
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def _without_rounding(node: Any, rounded: set[str]) -> list[Any]:
    """What stands for a node of an integer product; any other node itself.

    Args:
        rounded: names of the activations' codes.
    """
    from onnx import TensorProto
    from onnx.helper import make_node

    if node.op_type == "QuantizeLinear":
        return [make_node("Div", node.input[:2], node.output)]
    if node.op_type == "DequantizeLinear" and node.input[0] in rounded:
        return [make_node("Mul", node.input[:2], node.output)]
    if node.op_type == "DequantizeLinear":  # of a weight; left as it is, its product would round
        codes = f"{node.output[0]}.codes"
        cast = make_node("Cast", [node.input[0]], [codes], to=TensorProto.FLOAT)
        return [cast, make_node("Mul", [codes, node.input[1]], node.output)]
    if node.op_type == "DynamicQuantizeLinear":
        codes, step, _ = node.output
        node.output[0] = f"{codes}.rounded"
        return [node, make_node("Div", [node.input[0], step], [codes])]
    if node.op_type == "MatMulInteger":
        weight = f"{node.output[0]}.weight"
        cast = make_node("Cast", [node.input[1]], [weight], to=TensorProto.FLOAT)
        return [cast, make_node("MatMul", [node.input[0], weight], node.output)]
    return [node]


def find_provider(device: str) -> str:
    """The execution provider of a short name: cuda is CUDAExecutionProvider.

    Raises:
        CompressError: this installation of ONNX Runtime has none of that name.
    """
    there = {p.removesuffix("ExecutionProvider").lower(): p for p in get_available_providers()}
    if device.lower() not in there:
        raise CompressError(
            f"--device {device}: the ONNX Runtime installed here has no such execution provider",
            f"--device {' or '.join(sorted(there))}, or install an onnxruntime that has it",
        )
    return there[device.lower()]


def _load(
    model: str | bytes, file: Path, settings: SessionOptions, provider: str
) -> InferenceSession:
    if isinstance(model, bytes):
        folder = "session.model_external_initializers_file_folder_path"
        settings.add_session_config_entry(folder, str(file.parent))
    try:
        return InferenceSession(model, settings, providers=list(dict.fromkeys((provider, CPU))))
    except _FAILURES as error:
        raise refusal(file, error, "ONNX Runtime", onnxruntime.__version__) from error
