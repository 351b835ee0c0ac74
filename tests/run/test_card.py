"""The lines of a model card run as they stand; those of exported files run in tests/export."""

import json
import subprocess
import sys
import warnings

import pytest
import transformers

from compressor.export import safetensors
from compressor.model.manifest import Manifest
from compressor.model.sparse import promise, prunable
from compressor.run.card_usage import usage
from conftest import character_tokenizer
from families import pico

READ_IMAGES = {
    "image_processor_type": "ViTImageProcessorPil",
    "size": {"height": 16, "width": 16},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("bert", {}),
        ("bert", {"head": False}),
        ("t5", {}),
        ("whisper", {"max_source_positions": 50}),
        ("vit", {}),
        ("vit", {"head": False}),
    ],
)
def test_the_lines_for_plain_transformers_run(name, options, tmp_path, capsys):
    model = pico(name, **options)
    model.module.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    if name == "whisper":
        hear = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
        hear.save_pretrained(tmp_path)
    if name == "vit":
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(READ_IMAGES))
    manifest = Manifest("artifact", name, {}, engine="torch")
    assert "tensor" in run_lines(manifest, model.task, tmp_path, capsys)


@pytest.mark.parametrize(
    ("name", "options"), [("llama", {}), ("bert", {}), ("t5", {}), ("vit", {"head": False})]
)
def test_the_lines_for_packed_weights_run(name, options, tmp_path, capsys):
    model = pico(name, processor=character_tokenizer(), **options)
    for layer, linear in prunable(model).items():
        linear.weight.data[:, ::2] = 0
        promise(model, layer, "unstructured")
    if name == "vit":
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(READ_IMAGES))
    manifest = safetensors.run(model, safetensors.Options(packed=True), tmp_path).manifest
    assert run_lines(manifest, model.task, tmp_path, capsys)


@pytest.mark.parametrize(
    ("name", "options", "raw"),
    [
        ("llama", {}, (1, 3)),
        ("bert", {"head": False}, (1, 3)),
        ("t5", {}, (1, 3)),
        ("vit", {"num_channels": 1}, (1, 1, 16, 16)),
    ],
)
def test_the_lines_take_raw_inputs_where_nothing_reads(name, options, raw, tmp_path, capsys):
    model = pico(name, **options)
    manifest = safetensors.run(model, safetensors.Options(), tmp_path).manifest
    manifest.metrics["raw_inputs"] = raw
    assert run_lines(manifest, model.task, tmp_path, capsys)


def test_a_spiking_network_is_registered_by_its_lines(tmp_path):
    """In a process of its own: here transformers knows the classes already."""
    from spiking import spiking

    spiking(levels=None).module.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(READ_IMAGES))
    manifest = Manifest("artifact", "qsd_transformer", {}, engine="torch")
    lines = f"DIR = {str(tmp_path)!r}\n{usage(manifest, 'image-classification')}"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert "logits" in done.stdout, done.stderr


def run_lines(manifest, task, folder, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers says of lengths and defaults
        exec(usage(manifest, task), {"DIR": str(folder)})
    return capsys.readouterr().out
