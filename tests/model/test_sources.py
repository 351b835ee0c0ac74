"""Nothing is loaded that should not be trusted, and every refusal says what to do."""

import json
import struct

import pytest

from compressor.errors import CompressError
from compressor.model.checkpoint import load_directory
from compressor.model.sources import check_safetensors, describe_source, resolve


@pytest.fixture
def checkpoint(pico_llama, tmp_path):
    folder = tmp_path / "llama"
    pico_llama().module.save_pretrained(folder)
    return folder


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder):
    with pytest.raises(CompressError) as caught:
        load_directory(folder)
    assert caught.value.hint
    return caught.value.what


def test_a_folder_without_config_is_no_checkpoint(tmp_path):
    assert "no config.json" in refused(tmp_path)


def test_broken_config(checkpoint):
    (checkpoint / "config.json").write_text("{")
    assert "not valid JSON" in refused(checkpoint)


def test_unknown_architecture_names_the_missing_rows(checkpoint):
    edit_config(checkpoint, model_type="mamba")
    with pytest.raises(CompressError) as caught:
        load_directory(checkpoint)
    assert "mamba" in caught.value.what
    assert "qkv" in caught.value.hint and "families.py" in caught.value.hint


def test_truncated_weights(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in refused(checkpoint)


def test_corrupt_header(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])
    assert "bad header" in refused(checkpoint)
    file.write_bytes(b"abc")
    with pytest.raises(CompressError, match="bad header"):
        check_safetensors(file)


def test_pickles_are_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert "pickled" in refused(checkpoint)


def test_an_index_must_stay_in_its_directory(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside its directory" in refused(checkpoint)


def test_missing_weights_are_never_made_up(checkpoint):
    edit_config(checkpoint, num_hidden_layers=4)
    assert "do not fill the model" in refused(checkpoint)


def test_remote_code_is_not_run(checkpoint):
    (checkpoint / "evil.py").write_text("raise SystemExit('remote code ran')")
    edit_config(checkpoint, auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert load_directory(checkpoint).task == "causal-lm"


def test_names_that_lead_nowhere():
    with pytest.raises(CompressError, match="does not exist"):
        resolve("./nowhere")
    with pytest.raises(CompressError, match="is not installed"):
        resolve("package:no-such-package-here")
    with pytest.raises(CompressError, match="carries no checkpoint"):
        resolve("package:pytest")
    with pytest.raises(CompressError, match="could not be fetched"):
        resolve("owner/name")


def test_the_digest_covers_weights_and_config(checkpoint):
    before = describe_source(resolve(str(checkpoint)))
    assert before["id"] == "llama"
    edit_config(checkpoint, rms_norm_eps=1e-4)
    assert describe_source(resolve(str(checkpoint)))["sha256"] != before["sha256"]
