"""One ONNX graph, loaded by ONNX Runtime."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxruntime import InferenceSession, OrtValue
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    SessionOptions,
)

from compressor.errors import CompressError, first_line

_ERRORS_ONLY = 3  # log_severity_level


class Session:
    """A loaded file.

    Attributes:
        inputs: {name: shape}; a free axis is its name.
        outputs: names.

    Raises:
        CompressError: the file is missing, or ONNX Runtime cannot load it.
    """

    def __init__(self, file: Path, threads: int | None = None, exact: bool = False) -> None:
        if not file.is_file():
            raise CompressError(
                f"'{file.parent.name}' has no {file.name}", "name a directory of export.onnx"
            )
        settings = SessionOptions()
        settings.log_severity_level = _ERRORS_ONLY
        settings.intra_op_num_threads = threads or 0
        # Idle threads that spin win nothing for one stream of requests and slow its neighbours.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = _load(float_activations(file) if exact else str(file), file, settings)
        self.inputs: dict[str, list[Any]] = {i.name: i.shape for i in self._session.get_inputs()}
        self.outputs = [o.name for o in self._session.get_outputs()]

    def run(
        self, feeds: Mapping[str, OrtValue], outputs: Sequence[str] | None = None
    ) -> dict[str, OrtValue]:
        """Run the graph for all outputs, or for those named, in their order."""
        names = list(outputs or self.outputs)
        return dict(zip(names, self._session.run_with_ort_values(names, dict(feeds)), strict=True))


def float_activations(file: Path) -> bytes:
    """The model with float activations; external data stays outside.

    Every MatMulNBits gets accuracy_level 1, and integer products become float ones of the inputs
    over their steps, not rounded.
    """
    import onnx

    model = onnx.load(file, load_external_data=False)
    nodes = []
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
        nodes.extend(_without_rounding(node))
    del model.graph.node[:], model.graph.value_info[:]  # which tell the types of codes
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def _without_rounding(node: Any) -> list[Any]:
    """What stands for a node of an integer product; any other node itself."""
    from onnx import TensorProto
    from onnx.helper import make_node

    if node.op_type == "QuantizeLinear":
        return [make_node("Div", node.input[:2], node.output)]
    if node.op_type == "DynamicQuantizeLinear":
        codes, step, _ = node.output
        node.output[0] = f"{codes}.rounded"
        return [node, make_node("Div", [node.input[0], step], [codes])]
    if node.op_type == "MatMulInteger":
        weight = f"{node.output[0]}.weight"
        cast = make_node("Cast", [node.input[1]], [weight], to=TensorProto.FLOAT)
        return [cast, make_node("MatMul", [node.input[0], weight], node.output)]
    return [node]


def _load(model: str | bytes, file: Path, settings: SessionOptions) -> InferenceSession:
    if isinstance(model, bytes):
        folder = "session.model_external_initializers_file_folder_path"
        settings.add_session_config_entry(folder, str(file.parent))
    try:
        return InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf) as error:
        raise CompressError(
            f"ONNX Runtime cannot load {file.name} of '{file.parent.name}': {first_line(error)}",
            "export it again",
        ) from error
