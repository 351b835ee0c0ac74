"""A quantized model given to a quantizer: with `requantize`, the float one takes its place."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.errors import CompressError
from compressor.run.layout import stage_name
from compressor.run.preflight import plan
from compressor.screen import Silent

ZEROS = {"prune.magnitude": {"pattern": "2:4"}}
BITS = {"quantize.rtn": {"bits": 4, "group": 16}}
AGAIN = {"quantize.rtn": {"bits": 8, "group": 16}}


class Heard(Silent):
    """A screen that remembers what was said."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def go(tmp_path):
    """Factory: run, or plan, these stages."""

    def start(name, model, *stages, do=compressor.run, screen=None, **keys):
        profile = tmp_path / "p.yaml"
        profile.write_text(json.dumps({"stages": stages, "measures": []} | keys))
        more = {"screen": screen} if screen else {}
        return do(str(profile), str(model), out=tmp_path / name, **more)

    return start


def weights(result):
    return load_file(result.checkpoint.path / "model.safetensors")


def test_it_starts_from_the_float_stage_beside_the_quantized_one(go, llama_folder, tmp_path):
    go("made", llama_folder, ZEROS, BITS)
    four = tmp_path / "made" / stage_name(2, "quantize.rtn")
    with pytest.raises(CompressError, match="quantized already") as caught:
        go("again", four, AGAIN)
    assert caught.value.hint.startswith("requantize: true, or --model")
    screen = Heard()
    again = weights(go("again", four, AGAIN, requantize=True, screen=screen))
    assert any("this starts from 01-prune.magnitude, which is float" in x for x in screen.lines)
    direct = weights(go("direct", four.with_name(stage_name(1, "prune.magnitude")), AGAIN))
    assert again.keys() == direct.keys()
    assert all(torch.equal(direct[key], again[key]) for key in again)


def test_without_a_float_stage_nothing_is_begun(go, llama_folder, tmp_path):
    go("made", llama_folder, ZEROS, BITS, keep="last")
    four = tmp_path / "made" / stage_name(2, "quantize.rtn")
    for do in (plan, compressor.run):
        with pytest.raises(CompressError, match="was made from is not here"):
            go("again", four, AGAIN, do=do, requantize=True)
    assert not (tmp_path / "again").exists()


def test_an_original_takes_its_place_only_while_it_is_the_same(
    go, llama_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(llama_folder.parent)
    go("made", llama_folder, BITS)
    four = tmp_path / "made" / stage_name(1, "quantize.rtn")
    again = go("again", four, AGAIN, requantize=True)
    direct = go("direct", llama_folder, AGAIN)
    assert again.checkpoint.manifest.fingerprint == direct.checkpoint.manifest.fingerprint
    file = llama_folder / "model.safetensors"
    save_file({k: 2 * v for k, v in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(CompressError, match="is not here"):
        go("third", four, AGAIN, requantize=True)


def test_a_float_model_and_exports_alone_take_no_notice(go, llama_folder, tmp_path):
    made = go("made", llama_folder, BITS, requantize=True)
    assert made.checkpoint.manifest.base_model["id"] == llama_folder.name
    four = tmp_path / "made" / stage_name(1, "quantize.rtn")
    packed = go("file", four, {"export.safetensors": {}}, requantize=True)
    assert packed.checkpoint.manifest.formats == made.checkpoint.manifest.formats
