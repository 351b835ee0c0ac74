"""A cache in 8 bits in a run: what may follow the stage, and what leaves it."""

import pytest

import compressor
from compressor.errors import CompressError
from compressor.model.checkpoint import Checkpoint
from compressor.model.sources import CACHE
from compressor.run.standalone import export_checkpoint

PROFILE = """\
name: cached
stages:
  - quantize.rtn: {{bits: 8, group: 16, uneven: channel}}
  - quantize.cache: {{samples: 8, length: 16}}
  - {}
measures: [size]
"""


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("export.genai", "export.genai cannot say"),
        ("export.safetensors", "export.safetensors cannot say"),
        ("export.onnx: {attention: plain}", "ONNX standard"),
        ("quantize.rtn: {group: 16, uneven: channel}", "quantize.rtn would change"),
    ],
)
def test_what_may_follow_is_known_before_any_work(stage, said, llama_folder, text_file, tmp_path):
    profile = tmp_path / "cached.yaml"
    profile.write_text(PROFILE.format(stage))
    with pytest.raises(CompressError, match=said):
        compressor.plan(profile, str(llama_folder), data=str(text_file))


def test_a_run_from_weights_to_a_graph(llama_folder, text_file, tmp_path):
    profile = tmp_path / "cached.yaml"
    profile.write_text(PROFILE.format("export.onnx"))
    run = compressor.run(
        profile, model=str(llama_folder), data=str(text_file), out=tmp_path / "out"
    )
    made = run.path / "03-export.onnx"
    assert (run.path / "02-quantize.cache" / CACHE).is_file()
    assert "in 8 bits: a token takes" in (made / "README.md").read_text()
    assert compressor.verify(made)["ok"]
    with pytest.raises(CompressError, match="cannot say that the cache"):
        export_checkpoint(
            str(run.path / "02-quantize.cache"), to="safetensors", out=tmp_path / "dense"
        )
    (run.path / "02-quantize.cache" / CACHE).unlink()
    with pytest.raises(CompressError, match=r"misses cache\.safetensors"):
        Checkpoint.open(run.path / "02-quantize.cache").load()
