"""Minitron, 8-bit codes and the proof of a save, on every family of the table."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from compressor.errors import CompressError
from compressor.model.checkpoint import load_directory
from compressor.model.count import count_parameters
from compressor.model.forward import outputs
from compressor.model.shapes import depth_axis
from compressor.model.shrink import Kept, shrink
from compressor.prune import minitron
from compressor.quantize import rtn
from compressor.run.prove import save_and_prove
from families import CONFIGS, pico, random_inputs
from predicting import labelled, scored


def prune(model, work, read=random_inputs, **budget):
    batches = [read(model, seed=i) for i in range(2)]
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


def without(name, number, layer):
    """A pico model that lost one layer of stack `number`."""
    model = pico(name)
    whole = Kept.everything(model)
    stacks = list(whole.stacks)
    stays = [i for i in stacks[number].layers if i != layer]
    stacks[number] = replace(stacks[number], layers=stays)
    shrink(model, replace(whole, stacks=tuple(stacks)))
    return model


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@torch.no_grad()
def test_the_layer_that_is_missed_least_goes_by_perplexity(name, make_work, tmp_path):
    model, goal, wanted, start = pico(name), {}, [], 0
    batches = [labelled(model, seed=i) for i in range(2)]
    for number, stack in enumerate(model.family.stacks):
        depth, losses = len(model.blocks(stack)), []
        for layer in range(depth):
            parts = [scored(without(name, number, layer), batch) for batch in batches]
            logits, targets = (torch.cat(part) for part in zip(*parts, strict=True))
            losses.append(float(cross_entropy(logits, targets)))
        wanted += [start + i for i in range(depth) if i != losses.index(min(losses))]
        goal[depth_axis(number)] = depth - 1
        start += depth
    prune(model, make_work(), labelled, sizes=goal, layer_importance="perplexity")
    assert model.notes["kept_layers"] == wanted
    save_and_prove(model, tmp_path, tmp_path / "absent")
    assert {axis: load_directory(tmp_path).sizes[axis] for axis in goal} == goal


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_merged_heads_survive_the_disk(name, make_work, tmp_path):
    model, dropped = pico(name), pico(name)
    batch = random_inputs(model)
    prune(dropped, make_work(), sizes={"heads": 2})
    prune(model, make_work(), sizes={"heads": 2}, merge_heads=True)
    merged = outputs(model, batch)["logits"]
    assert not torch.allclose(merged, outputs(dropped, batch)["logits"], atol=1e-3)
    save_and_prove(model, tmp_path, tmp_path / "absent")
    again = load_directory(tmp_path)
    assert again.sizes["heads"] == 2
    torch.testing.assert_close(outputs(again, batch)["logits"], merged, atol=1e-6, rtol=1e-6)


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
