"""What onnxruntime-genai is not even asked; what it runs is in tests/export/test_genai.py."""

import pytest

from compressor.engines.genai import CONFIG, GenaiEngine
from compressor.errors import CompressError


@pytest.mark.parametrize("text", ['{"model": {', "{}", "[]"])
def test_a_damaged_config_is_named(text, tmp_path):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(CompressError, match=f"{CONFIG} of '{tmp_path.name}' is damaged"):
        GenaiEngine(tmp_path)
