"""Whole runs for images, pairs, clips and masked tokens: prune, distil, quantize, measure."""

import json

import pytest

import compressor
from conftest import character_tokenizer, letter_tokenizer
from families import pico

PROFILE = """\
name: tasks
description: every stage but an export
stages:
  - prune.minitron: {{sizes: {{mlp: 32}}, samples: 8, length: 16}}
  - {distill}
  - quantize.rtn: {{bits: 8, group: 16}}
measures:
  - fidelity: {{rows: 8, length: 16, batch: 4}}
  - accuracy: {{rows: 8, length: 16, batch: 4}}
  - size: {{}}
"""
TRAIN = "train: {steps: 3, batch: 2, length: 16, lr: 1.0e-3, warmup: 1, precision: float32}"


def folder_of(name, tmp_path, tokenizer=None, **overrides):
    model, folder = pico(name, **overrides), tmp_path / "model"
    model.module.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def run(tmp_path, model, data, distill):
    path = tmp_path / "tasks.yaml"
    path.write_text(PROFILE.format(distill=distill))
    return compressor.run(str(path), model=str(model), data=str(data), out=tmp_path / "out")


def check(result, stages=3):
    """Everything was made, and the candidate was measured beside the original."""
    assert len(json.loads((result.path / "report.json").read_text())["stages"]) == stages
    qualities = [c["quality"] for c in result.metrics["bench"]["candidates"]]
    assert qualities[0]["kl"]["value"] == 0 and qualities[1]["kl"]["value"] > 0
    assert all(0 <= q["accuracy"]["value"] <= 1 for q in qualities)
    return qualities


@pytest.mark.parametrize("distill", ["kd: {ce: 0.5, ", "latent: {layers: 0.5, "])
def test_a_vit_on_mnist(distill, shared_data, tmp_path):
    model = folder_of("vit", tmp_path, num_labels=10)
    data = shared_data / "data" / "t10k-images-idx3-ubyte.gz"
    result = run(tmp_path, model, data, f"distill.{distill}{TRAIN}}}")
    assert check(result)[0]["accuracy"]["n"] == 8


def test_a_t5_on_problems_and_answers(shared_data, tmp_path):
    model = folder_of("t5", tmp_path, character_tokenizer())
    lines = (shared_data / "data" / "gsm8k-train-2000.jsonl").read_text().splitlines()
    data = tmp_path / "problems.jsonl"
    data.write_text("\n".join(lines[:200]))
    check(run(tmp_path, model, data, f"distill.kd: {{{TRAIN}}}"))


@pytest.mark.parametrize("method", ["kd", "ce"])
def test_a_masked_bert(method, text_file, tmp_path):
    model = folder_of("bert", tmp_path, letter_tokenizer())
    check(run(tmp_path, model, text_file, f"distill.{method}: {{{TRAIN}}}"))


def test_a_whisper_on_pieces_of_a_speech(shared_data, tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="reading sound needs soundfile")
    model = folder_of("whisper", tmp_path, character_tokenizer())
    samples, rate = soundfile.read(shared_data / "data" / "jfk.flac")
    size, lines = int(0.3 * rate), ["audio,text"]
    for i in range(30):
        soundfile.write(tmp_path / f"{i}.flac", samples[i * size : (i + 1) * size], rate)
        lines.append(f"{i}.flac,piece {i}")
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    check(run(tmp_path, model, tmp_path / "clips.csv", f"distill.kd: {{{TRAIN}}}"))
