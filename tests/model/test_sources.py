"""Nothing is loaded that should not be trusted, and every refusal says what to do."""

import json
import struct
from fnmatch import fnmatch

import huggingface_hub
import pytest

from compressor.errors import CompressError
from compressor.model.checkpoint import load_directory
from compressor.model.saving import save
from compressor.model.sources import (
    Source,
    check_safetensors,
    describe_source,
    model_files,
    resolve,
)
from compressor.quantize import rtn


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
    assert "qkv" in caught.value.hint and "family_table.py" in caught.value.hint


def test_truncated_weights(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in refused(checkpoint)


def test_corrupt_header(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])
    assert "header too large" in refused(checkpoint)
    file.write_bytes(b"abc")
    with pytest.raises(CompressError, match="header too small"):
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


def test_layers_are_never_left_out(checkpoint):
    edit_config(checkpoint, num_hidden_layers=1)
    assert "more layers than its config.json (model.layers.1." in refused(checkpoint)


@pytest.mark.parametrize(
    ("header", "licence"),
    [
        ("license: mit", "mit"),
        ('license: "mit"  # see below', "mit"),
        ("license: [mit, apache-2.0]", ["mit", "apache-2.0"]),
        ("license: mit\ndate: 2024-13-45", "mit"),
        ("tags: [x]", None),
        ("license: [", None),
    ],
)
def test_the_licence_of_a_card(checkpoint, header, licence):
    (checkpoint / "README.md").write_text(f"---\n{header}\n---\nlicense: other\n")
    assert describe_source(Source(checkpoint, "x"))["license"] == licence


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


@pytest.mark.parametrize("bits", [None, 8], ids=["float", "packed"])
def test_shapes_that_do_not_match_their_bytes(pico_llama, make_work, tmp_path, bits):
    model = pico_llama()
    if bits:
        rtn.run(model, rtn.Options(bits=bits, group=16), make_work())
    (tmp_path / "parent").mkdir()
    save(model, tmp_path, tmp_path / "parent")
    file = next(tmp_path.glob("*.safetensors"))
    raw = file.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:end])
    header["model.norm.weight"]["shape"] = [31]
    text = json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[end:])
    with pytest.raises(CompressError, match="truncated or damaged"):
        load_directory(tmp_path, model.formats)


def test_weights_that_another_tool_quantized(checkpoint):
    edit_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    assert refused(checkpoint) == "'llama' is already quantized by gptq"
    edit_config(checkpoint, quantization_config="unknown")
    assert "another tool" in refused(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "abc"},
        {"hidden_size": 30},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"dtype": "abc"},
    ],
    ids=str,
)
def test_config_values_that_make_no_model(checkpoint, change):
    edit_config(checkpoint, **change)
    assert "makes no llama model" in refused(checkpoint)


def test_heads_that_do_not_divide_the_width_of_an_encoder(pico_bert, tmp_path):
    pico_bert().module.save_pretrained(tmp_path)
    edit_config(tmp_path, num_attention_heads=5)
    assert "makes no bert model: 32 hidden, 5 heads" in refused(tmp_path)


def test_the_digest_covers_every_file_that_is_used(pico_bert, tmp_path):
    model = pico_bert()
    model.module.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    seen = {describe_source(resolve(str(tmp_path)))["sha256"]}
    for name in ("tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json"):
        (tmp_path / name).write_text("[]")
        digest = describe_source(resolve(str(tmp_path)))["sha256"]
        assert digest not in seen, name
        seen.add(digest)
    (tmp_path / "vocab.txt").rename(tmp_path / "merges.txt")
    assert describe_source(resolve(str(tmp_path)))["sha256"] not in seen
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.txt")
    (tmp_path / "notes.txt").write_text("nobody reads this")
    assert describe_source(resolve(str(tmp_path)))["sha256"] == digest


def test_the_card_and_the_licence_are_fetched_with_the_weights(monkeypatch, tmp_path):
    given = {}

    def snapshot_download(name, allow_patterns):
        given[name] = allow_patterns
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("owner/name").path == tmp_path
    for wanted in ("README.md", "LICENSE", "LICENSE.txt", "model.safetensors", "tokenizer.json"):
        assert any(fnmatch(wanted, pattern) for pattern in given["owner/name"]), wanted


def test_files_of_other_tools_beside_a_checkpoint_do_not_count(pico_llama, tmp_path):
    folder = tmp_path / "cloned"
    pico_llama().module.save_pretrained(folder)
    wanted = [file.name for file in model_files(folder)]
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "openvino_model.xml").write_text("<net/>")
    assert [file.name for file in model_files(folder)] == wanted == ["model.safetensors"]
