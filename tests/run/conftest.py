"""A pico checkpoint on disk, a text to train on, and a profile that uses every kind of stage."""

import random

import pytest

WORDS = ["stone", "river", "bread", "cloud", "lamp", "ship", "garden", "wolf", "paper", "song"]
CHAIN = """\
name: pico
description: every kind of stage on a tiny decoder
stages:
  - prune.minitron: {sizes: {mlp: 32, layers: 2}, samples: 8, length: 16}
  - distill.kd: {train: {steps: 3, batch: 2, length: 16, lr: 1.0e-3, warmup: 1, precision: float32}}
  - quantize.rtn: {bits: 8, group: 16, embeddings: true}
  - export.safetensors: {}
measures: []
"""


@pytest.fixture
def text_file(tmp_path):
    """120 short documents of random words, separated by blank lines."""
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS, k=30)) + "." for _ in range(120)]
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture
def llama_folder(pico_llama, tmp_path):
    """A pico Llama checkpoint directory."""
    model = pico_llama(tie_word_embeddings=True)
    folder = tmp_path / "pico-llama"
    model.module.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def chain(tmp_path):
    """Path of the profile."""
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN)
    return path
