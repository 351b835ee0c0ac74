"""Skipped layers against a model that really lost them, and rankings against brute force."""

import copy
import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from compressor.model.depth import consecutive, removal_scores, skipping
from compressor.model.forward import outputs
from compressor.model.importance import measure_importance
from compressor.model.model import Model
from compressor.model.shrink import Kept, shrink
from compressor.prune.damage import DAMAGES
from families import CONFIGS, pico, random_inputs

EXACT = {"atol": 1e-5, "rtol": 1e-5}


def without(model, number, layers):
    """A copy of a model whose stack `number` really lost some layers."""
    cut = dataclasses.replace(model, module=copy.deepcopy(model.module))
    everything = Kept.everything(cut)
    stacks = list(everything.stacks)
    stays = [i for i in stacks[number].layers if i not in layers]
    stacks[number] = dataclasses.replace(stacks[number], layers=stays)
    shrink(cut, Kept(tuple(stacks), everything.hidden))
    return cut


def labelled(model, seed=7):
    """Random inputs, and right answers where the task has them."""
    batch = random_inputs(model, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    if "pixel_values" in batch:
        return batch | {"labels": torch.randint(0, 5, (3,), generator=draw)}
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    ids = torch.randint(5, 96, mask.shape, generator=draw)
    return batch | {"labels": ids.masked_fill(mask < 1, -100)}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_skipped_layer_is_a_removed_layer(name):
    model = pico(name)
    batch = random_inputs(model)
    for number, stack in enumerate(model.family.stacks):
        for layers in ([0], [len(model.blocks(stack)) - 1]):
            with skipping(model, (stack, layers)):
                got = outputs(model, batch)["logits"]
            wanted = outputs(without(model, number, layers), batch)["logits"]
            torch.testing.assert_close(got, wanted, **EXACT)
    assert all(not part._forward_hooks for part in model.module.modules())


@torch.no_grad()
def answered(model, batch):
    """Logits [A, V] and targets [A] of every answer, straight from transformers."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if model.task == "causal-lm" and "gpt2" in model.family.model_type:
        inputs["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model.module(**inputs).logits
    if model.task == "causal-lm":
        mask = batch["attention_mask"].bool()
        keep = mask[:, 1:] & mask[:, :-1]
        return logits[:, :-1][keep], batch["input_ids"][:, 1:][keep]
    keep = batch["labels"] != -100
    return logits[keep], batch["labels"][keep]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "t5", "whisper", "vit"])
def test_scores_by_removal_equal_those_of_models_that_lost_the_layers(name):
    model = pico(name)
    batches = [labelled(model, seed) for seed in (1, 2)]
    pairs = [(n, s, [i]) for n, s in enumerate(model.family.stacks) for i in range(2)]
    removals = [(stack, layers) for _, stack, layers in pairs]
    loss = removal_scores(model, removals, batches, DAMAGES["perplexity"])
    drop = removal_scores(model, removals, batches, DAMAGES["accuracy"])
    whole = [torch.cat(x) for x in zip(*(answered(model, b) for b in batches), strict=True)]
    right = (whole[0].argmax(-1) == whole[1]).double().mean()
    for i, (number, _, layers) in enumerate(pairs):
        cut = without(model, number, layers)
        logits, targets = (
            torch.cat(x) for x in zip(*(answered(cut, b) for b in batches), strict=True)
        )
        wanted = cross_entropy(logits.double(), targets)
        assert float(loss[i]) == pytest.approx(float(wanted), rel=1e-5)
        lost = right - (logits.argmax(-1) == targets).double().mean()
        assert float(drop[i]) == pytest.approx(float(lost), abs=1e-6)


def test_the_output_of_a_bare_encoder(pico_bert, make_work):
    model = pico_bert()
    batches = make_work().batches("calibration", 2)
    (stack,) = model.family.stacks
    got = removal_scores(model, [(stack, [1])], batches, DAMAGES["output"])
    cosines = []
    for batch in batches:
        keep = batch["attention_mask"].bool()
        before, after = (
            outputs(m, batch)["last_hidden_state"][keep].double()
            for m in (model, without(model, 0, [1]))
        )
        cosines.append(torch.cosine_similarity(before, after))
    assert float(got) == pytest.approx(1 - float(torch.cat(cosines).mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5"])
@torch.no_grad()
def test_windows_compare_what_goes_in_with_what_comes_out(name):
    model = pico(name)
    batch = random_inputs(model)
    lengths = [2, 1][: len(model.family.stacks)]
    got = measure_importance(model, [batch], windows=lengths)
    streams = {}
    for stack in model.family.stacks:
        for i, block in enumerate(model.blocks(stack)):

            def keep(_, args, kwargs, output, key=(stack, i)):
                after = output[0] if isinstance(output, tuple) else output
                streams[key] = (args[0] if args else kwargs["hidden_states"], after)

            block.register_forward_hook(keep, with_kwargs=True)
    outputs(model, batch)
    for stack, n, own in zip(model.family.stacks, lengths, got.stacks, strict=True):
        depth, mask = len(model.blocks(stack)), batch[stack.mask].bool()
        assert len(own.windows_W) == len(consecutive(depth, n)) == depth - n + 1
        for first in range(depth - n + 1):
            x, y = streams[stack, first][0][mask], streams[stack, first + n - 1][1][mask]
            cosine = torch.cosine_similarity(x.double(), y.double()).mean()
            assert float(own.windows_W[first]) == pytest.approx(1 - float(cosine), rel=1e-4)
        if n == 1:
            torch.testing.assert_close(own.windows_W, own.layers_L)


def test_progress_counts_every_pass():
    model, seen = pico("llama"), []
    (stack,) = model.family.stacks
    removals = [(stack, layers) for layers in consecutive(3, 2)]
    batches = [random_inputs(model, seed=i) for i in range(3)]
    removal_scores(model, removals, batches, DAMAGES["output"], seen.append)
    assert sum(seen) == 6
    assert isinstance(model, Model)


@pytest.mark.parametrize("name", ["t5", "whisper", "gpt2", "vit"])
def test_the_output_of_every_kind_of_backbone_turns_without_a_layer(name):
    model = pico(name)
    removals = [(stack, [0]) for stack in model.family.stacks]
    found = removal_scores(model, removals, [random_inputs(model)], DAMAGES["output"])
    assert bool((found > 1e-4).all()) and bool((found < 2).all())
