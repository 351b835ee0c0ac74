"""A quantized model given to a quantizer: with `from_float`, its float parent comes instead."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.errors import CompressError
from compressor.run import from_float
from compressor.run.preflight import plan
from compressor.screen import Silent

ZEROS = {"prune.magnitude": {"pattern": "2:4"}}
BITS = {"quantize.rtn": {"bits": 4, "group": 16}}
AGAIN = {"quantize.rtn": {"bits": 8, "group": 16}}
FILE = {"export.safetensors": {}}


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


def test_it_starts_from_the_float_stage_beside_the_quantized_one(go, llama_folder):
    made = go("made", llama_folder, ZEROS, BITS)
    four = made.checkpoint.path
    with pytest.raises(CompressError, match="quantized already") as caught:
        go("again", four, AGAIN)
    beside = four.with_name("01-prune.magnitude")
    assert caught.value.hint.startswith(f"--set from_float=true, or --model {beside}, from which")
    (planned,) = go("again", four, AGAIN, from_float=True, do=plan)["remarks"]
    screen = Heard()
    again = weights(go("again", four, AGAIN, from_float=True, screen=screen))
    (said,) = [line for line in screen.lines if line.startswith(f"{four} is quantized")]
    assert said == planned and said.endswith(
        "this starts from 01-prune.magnitude, from which it was made"
    )
    direct = weights(go("direct", beside, AGAIN))
    assert again.keys() == direct.keys()
    assert all(torch.equal(direct[key], again[key]) for key in again)


def test_an_older_stage_does_not_take_the_place_of_one_that_is_gone(go, llama_folder, tmp_path):
    made = go("made", llama_folder, ZEROS, {"prune.magnitude": {"sparsity": 0.6}}, BITS)
    shutil.rmtree(tmp_path / "made" / "02-prune.magnitude")
    for do in (plan, compressor.run):
        with pytest.raises(CompressError, match=r"'03-quantize\.rtn' was quantized from is not"):
            go("again", made.checkpoint.path, AGAIN, do=do, from_float=True)
    assert not (tmp_path / "again").exists()


def test_an_original_takes_its_place_only_while_it_is_the_same(go, llama_folder):
    four = go("made", llama_folder, BITS).checkpoint.path
    again = go("again", four, AGAIN, from_float=True)
    direct = go("direct", llama_folder, AGAIN)
    assert again.checkpoint.manifest.fingerprint == direct.checkpoint.manifest.fingerprint
    file = llama_folder / "model.safetensors"
    save_file({k: 2 * v for k, v in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(CompressError, match="is not here"):
        go("third", four, AGAIN, from_float=True)


def test_it_finds_the_float_model_through_runs_that_did_the_same(go, llama_folder, monkeypatch):
    first = go("made", llama_folder, ZEROS, BITS).checkpoint.path
    second = go("again", first, AGAIN, from_float=True).checkpoint.path
    monkeypatch.chdir(second)  # named by a dot, it still knows what lies beside it
    third = go("third", ".", BITS, from_float=True).checkpoint
    assert third.manifest.fingerprint == compressor.Checkpoint.open(first).manifest.fingerprint


def test_a_folder_named_like_its_base_is_said_to_be_left(go, llama_folder, tmp_path, monkeypatch):
    four = go("made", llama_folder, BITS).checkpoint.path
    monkeypatch.chdir(four.parent)
    four.rename(four.parent / llama_folder.name)
    screen = Heard()
    go("again", llama_folder.name, AGAIN, from_float=True, screen=screen)
    assert any(line.startswith(f"{llama_folder.name} is quantized") for line in screen.lines)


def test_another_model_of_that_name_does_not(go, llama_folder, tmp_path, monkeypatch):
    four = go("made", llama_folder, BITS).checkpoint.path
    pruned = go("pruned", llama_folder, ZEROS).checkpoint.path  # its base is the original too
    (tmp_path / "elsewhere").mkdir()
    pruned.rename(tmp_path / "elsewhere" / llama_folder.name)
    shutil.rmtree(llama_folder)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(CompressError, match="is not here"):
        go("again", four, AGAIN, from_float=True)


def test_a_refusal_looks_beside_the_model_only(go, llama_folder, monkeypatch):
    four, opened = go("made", llama_folder, BITS).checkpoint.path, []
    real = from_float.open_source
    monkeypatch.setattr(from_float, "open_source", lambda name: opened.append(name) or real(name))
    with pytest.raises(CompressError, match="quantized already") as caught:
        go("again", four, AGAIN)
    assert f"--model {llama_folder.name}," in caught.value.hint
    assert str(four) in opened[1:]
    assert all(str(name).startswith(str(four.parent)) for name in opened)


def test_a_float_model_and_exports_alone_take_no_notice(go, llama_folder):
    screen = Heard()
    made = go("made", llama_folder, BITS, from_float=True, screen=screen)
    assert made.checkpoint.manifest.base_model["id"] == llama_folder.name
    packed = go("file", made.checkpoint.path, FILE, from_float=True, screen=screen)
    assert packed.checkpoint.manifest.formats == made.checkpoint.manifest.formats
    assert not any("is quantized" in line for line in screen.lines)
    with pytest.raises(CompressError, match="quantized already") as caught:
        go("base", made.checkpoint.path, FILE, from_float=True, baselines={"eight": [AGAIN]})
    assert "from_float" not in caught.value.hint
