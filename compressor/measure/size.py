"""Size of a candidate on disk.

bytes          all files a deployment copies: weights, configs, tokenizer. No manifest, card,
               probe, licence or data.
weights_bytes  the weight files alone
parameters     weights as the model counts them: a 4-bit code is one, a tied table counts once.
               Taken from the manifest of what `compress` made, else counted from the files'
               own headers (float tensors; integer buffers are no parameters).
"""

import math
from importlib import import_module
from pathlib import Path

from compressor.engines import Engine
from compressor.errors import CompressError
from compressor.model.manifest import NAME as MANIFEST
from compressor.model.manifest import quantized, read_manifest
from compressor.model.packed import dense_view
from compressor.model.sources import deployed_bytes, is_packed, model_files
from compressor.model.stream import open_tensors
from compressor.options import options
from compressor.training.workbench import Workbench


@options
class Options:
    """Nothing to choose."""


def run(engine: Engine, options: Options, work: Workbench) -> dict[str, float]:
    """Measure `engine.path`.

    Returns:
        parameters, bytes, weights_bytes.

    Raises:
        CompressError: the directory holds no weights.
    """
    weights = model_files(engine.path)
    return {
        "parameters": _parameters(engine.path, weights),
        "bytes": deployed_bytes(engine.path),
        "weights_bytes": sum(file.stat().st_size for file in weights),
    }


def _parameters(path: Path, weights: list[Path]) -> int:
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        if manifest.metrics.get("parameters") is not None:
            return manifest.metrics["parameters"]
        if quantized(manifest.formats):
            raise CompressError(
                f"the manifest of '{path.name}' does not say how many parameters it has",
                "write it again with this version of compress",
            )
    onnx = [file for file in weights if file.suffix == ".onnx"]
    if onnx:
        return _count_onnx(onnx[0])
    graphs = [file for file in weights if file.suffix == ".xml"]
    return sum(map(_count_openvino, graphs)) if graphs else _count_safetensors(weights)


def _count_safetensors(files: list[Path]) -> int:
    slices = open_tensors(files, mapped=True)
    if is_packed(files):
        slices = dense_view(slices)
    return sum(math.prod(s.get_shape()) for s in slices.values() if "F" in s.get_dtype())


def _count_openvino(file: Path) -> int:
    """Float constants with a shape."""
    core = import_module("openvino").Core()
    constants = (
        op for op in core.read_model(str(file)).get_ops() if op.get_type_name() == "Constant"
    )
    kinds = ("f32", "f16", "bf16")
    found = [
        op.output(0) for op in constants if op.output(0).get_element_type().to_string() in kinds
    ]
    return sum(math.prod(output.get_shape()) for output in found if len(output.get_shape()))


def _count_onnx(file: Path) -> int:
    """Float initializers with a shape; exporters write constants of a graph as scalars."""
    import onnx

    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    graph = onnx.load(str(file), load_external_data=False).graph
    return sum(math.prod(t.dims) for t in graph.initializer if t.dims and t.data_type in floats)
