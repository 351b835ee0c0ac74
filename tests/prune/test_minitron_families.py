"""Minitron, 8-bit codes and the proof of a save, on every family of the table."""

import pytest
import torch

from compressor.errors import CompressError
from compressor.model.checkpoint import load_directory
from compressor.model.count import count_parameters
from compressor.model.forward import outputs
from compressor.prune import minitron
from compressor.quantize import rtn
from compressor.run.prove import save_and_prove
from families import CONFIGS, pico, random_inputs


def prune(model, work, **budget):
    batches = [random_inputs(model, seed=i) for i in range(2)]
    object.__setattr__(work, "_batches", lambda *args, **shape: batches)
    minitron.run(model, minitron.Options(samples=6, length=11, multiple=4, **budget), work)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_budget_is_met_and_the_result_is_proved(name, make_work, tmp_path):
    model = pico(name)
    before = count_parameters(model.module)
    prune(model, make_work(), parameters=0.6)
    assert 0.45 * before < count_parameters(model.module) <= 0.6 * before
    folder = tmp_path / "float"
    folder.mkdir()
    manifest = save_and_prove(model, folder, tmp_path)
    assert manifest.family == name and (folder / "probe.safetensors").is_file()
    again = load_directory(folder)
    assert again.task == pico(name).task and again.sizes["mlp"] <= 48


@pytest.mark.parametrize("name", CONFIGS)
def test_eight_bit_codes_survive_the_disk(name, make_work, tmp_path):
    model = pico(name)
    batch = random_inputs(model)
    wanted = outputs(model, batch)["logits"]
    rtn.run(model, rtn.Options(bits=8, group=16, uneven="channel"), make_work())
    rounded = outputs(model, batch)["logits"]
    assert float((rounded - wanted).norm() / wanted.norm()) < 0.1
    save_and_prove(model, tmp_path, tmp_path / "absent")
    again = load_directory(tmp_path, model.formats)
    torch.testing.assert_close(outputs(again, batch)["logits"], rounded, atol=1e-5, rtol=1e-5)


def test_the_depth_of_a_decoder_is_an_axis_of_its_own(make_work):
    model = pico("t5")
    prune(model, make_work(), sizes={"layers": 2, "decoder_layers": 1, "heads": 3})
    assert (model.sizes["layers"], model.sizes["decoder_layers"]) == (2, 1)
    assert model.sizes["heads"] == 3 and model.sizes["hidden"] == 32
    assert len(model.notes["importance"]["layers"]) == 5  # of both stacks
    assert len(model.notes["kept_layers"]) == 3
    with pytest.raises(CompressError, match="has no decoder_layers"):
        prune(pico("bert"), make_work(), sizes={"decoder_layers": 1})
