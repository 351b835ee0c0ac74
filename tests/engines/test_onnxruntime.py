"""What the engine refuses to open; its numbers are checked in tests/export."""

import pytest

from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.errors import CompressError


def test_missing_file(tmp_path):
    with pytest.raises(CompressError, match=r"has no model\.onnx"):
        OnnxRuntimeEngine(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an onnx file", bytes(range(256)) * 8])
def test_damaged_file(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(CompressError, match=r"cannot load model\.onnx") as error:
        OnnxRuntimeEngine(tmp_path)
    assert error.value.hint
