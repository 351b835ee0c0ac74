"""What the engine refuses to open, and why; its numbers are checked in tests/export."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.engines.onnx_session import find_provider
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.errors import CompressError


def graph(path, operator="MatMul", domain="", opset=20, ir=10, external=False):
    """A model.onnx of one node and one weight [64, 64]."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64]) for n in "xy"]
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    node = helper.make_node(operator, ["x", "w"], ["y"], domain=domain)
    made = helper.make_graph([node], "g", values[:1], values[1:], [weight])
    known = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=known, ir_version=ir)
    onnx.save(
        model, path / "model.onnx", save_as_external_data=external, location="model.onnx.data"
    )
    return path


def test_missing_file(tmp_path):
    with pytest.raises(CompressError, match=r"has no model\.onnx"):
        OnnxRuntimeEngine(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an onnx file", bytes(range(256)) * 8])
def test_damaged_file(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(CompressError, match=r"cannot load model\.onnx") as error:
        OnnxRuntimeEngine(tmp_path)
    assert error.value.hint


@pytest.mark.parametrize(
    "newer",
    [{"opset": 99}, {"ir": 99}, {"operator": "Soon", "domain": "com.microsoft"}, {"operator": "S"}],
)
def test_an_engine_that_is_too_old_for_the_file(tmp_path, newer):
    with pytest.raises(CompressError, match=r"asks for more than ONNX Runtime \d+\.") as error:
        OnnxRuntimeEngine(graph(tmp_path, **newer))
    assert "pip install --upgrade onnxruntime" in error.value.hint


@pytest.mark.parametrize("left", [None, 100])
def test_a_file_without_its_external_data(tmp_path, left):
    data = graph(tmp_path, external=True) / "model.onnx.data"
    OnnxRuntimeEngine(tmp_path).close()
    content = data.read_bytes()
    data.unlink()
    if left is not None:
        data.write_bytes(content[:left])
    with pytest.raises(CompressError, match=r"keeps weights in model\.onnx\.data") as error:
        OnnxRuntimeEngine(tmp_path)
    assert "copy the directory again" in error.value.hint


def test_a_provider_that_is_not_here():
    assert find_provider("cpu") == "CPUExecutionProvider"
    with pytest.raises(CompressError, match="no such execution provider") as error:
        find_provider("tpu")
    assert "--device" in error.value.hint and "cpu" in error.value.hint
