"""Workers: any kind of input reaches them, and their threads are as many as was asked for."""

import dataclasses
import os
from contextlib import closing

import pytest
import torch

from compressor.measure.process import Worker, environment
from compressor.measure.speed_rows import speed_rows
from compressor.measure.worker import load_rows, save_rows
from compressor.run.standalone import export_checkpoint

IMAGES = {"pixel_values": torch.rand(8, 3, 4, 4), "labels": torch.arange(8), "row": torch.arange(8)}
SPEECH = {
    "input_features": torch.rand(2, 80, 30),
    "decoder_input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]),
    "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "document": torch.tensor([0, 1]),
}


def test_every_input_tensor_reaches_a_worker(tmp_path):
    save_rows([IMAGES, SPEECH], tmp_path / "rows.safetensors")
    images, speech = load_rows(tmp_path / "rows.safetensors")
    assert images.keys() == {"pixel_values"}
    assert torch.equal(images["pixel_values"], IMAGES["pixel_values"])
    assert speech.keys() == SPEECH.keys() - {"document"}
    assert all(torch.equal(speech[key], SPEECH[key]) for key in speech)


def test_rows_of_other_kinds_are_repeated_to_the_wanted_number(make_work):
    def rows(batch, count):
        work = dataclasses.replace(make_work(), _batches=lambda split, n, **shape: [batch])
        return speed_rows(work, count, 128)

    images = rows(IMAGES, 20)["pixel_values"]
    assert images.shape == (20, 3, 4, 4) and torch.equal(images[17], IMAGES["pixel_values"][1])
    speech = rows(SPEECH, 1)
    assert [tuple(speech[key].shape) for key in speech] == [(1, 80, 30), (1, 3), (1, 3)]
    tokens = speed_rows(make_work(), 3, 50)  # of text no row is padded
    assert tokens["input_ids"].shape == (3, 50) and bool(tokens["attention_mask"].all())


def test_the_number_of_threads_is_in_the_environment_before_anything_is_imported():
    found = environment(3)
    assert {found[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} == {"3"}
    assert found["PATH"] == os.environ["PATH"]


@pytest.fixture
def wide(pico_bert, tmp_path):
    """A checkpoint and its export whose matrix products are worth a second thread."""
    model = pico_bert(hidden_size=256, intermediate_size=1024, num_hidden_layers=1)
    model.module.save_pretrained(tmp_path / "a")
    model.processor.save_pretrained(tmp_path / "a")
    exported = export_checkpoint(str(tmp_path / "a"), to="onnx", out=tmp_path / "b").path
    return [tmp_path / "a", exported]


def test_one_thread_uses_one_core(wide, make_work, tmp_path):
    save_rows(make_work().batches("heldout", 4), tmp_path / "rows.safetensors")
    request = {"batches": [32], "length": 64, "seconds": 0.3}
    for path in wide:
        with closing(Worker(path.name, path, tmp_path / "rows.safetensors", 1)) as worker:
            worker.hear()
            assert 0 < worker.ask(request)["cores"] < 1.1
