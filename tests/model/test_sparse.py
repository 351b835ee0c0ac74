"""Which layers lose weights, what is promised of them, and that training keeps it."""

import dataclasses

import pytest
import torch
from torch import nn

from compressor.errors import CompressError
from compressor.model.checkpoint import load_directory
from compressor.model.saving import save
from compressor.model.sparse import (
    broken_promise,
    prunable,
    refuse_undivided,
    zeros_held,
)
from compressor.quantize import rtn
from families import CONFIGS, pico, sparse


@pytest.mark.parametrize("name", CONFIGS)
def test_the_linears_of_all_blocks_lose_weights_and_no_others(name):
    model = pico(name)
    named = [n for n, m in model.module.named_modules() if isinstance(m, nn.Linear)]
    numbered = [n for n in named if any(part.isdigit() for part in n.split("."))]
    assert list(prunable(model)) == numbered


def test_a_sparse_model_comes_back_as_a_float_model_with_its_promises(pico_llama, tmp_path):
    model = sparse(pico_llama())
    save(model, tmp_path, tmp_path)
    loaded = load_directory(tmp_path, model.formats)
    assert not broken_promise(loaded, model.formats)
    assert loaded.formats == model.formats
    assert isinstance(next(iter(prunable(loaded).values())), nn.Linear)


def test_a_revived_weight_breaks_the_promise(pico_llama):
    model = sparse(pico_llama())
    name, linear = next(iter(prunable(model).items()))
    linear.weight.data[0, :4] = 1.0
    assert name in broken_promise(model, model.formats)
    model = sparse(pico_llama(), "unstructured", 0.5)
    linear = prunable(model)[name]
    linear.weight.data[0, :] = 1.0
    assert "zeros instead of 50.00%" in broken_promise(model, model.formats)


def test_a_promised_layer_that_does_not_exist_breaks_the_promise(pico_llama):
    model = sparse(pico_llama())
    form = next(iter(model.formats.values()))
    for name in ("model.layers.7.mlp.up_proj", "model.layers.0.mlp"):
        wanted = f"'{name}' is not a layer of this model"
        assert broken_promise(model, model.formats | {name: form}) == wanted


def test_quantized_zeros_stay_zeros(pico_llama, make_work):
    for symmetric in (True, False):
        model = sparse(pico_llama())
        promised = dict(model.formats)
        rtn.run(model, rtn.Options(bits=4, group=16, symmetric=symmetric), make_work())
        assert not broken_promise(model, promised)
        assert model.formats[next(iter(promised))].pattern == "2:4"


def test_training_keeps_zeros_and_counts_only_kept_weights(pico_llama):
    model = sparse(pico_llama())
    model.module.requires_grad_(True)
    linears = prunable(model)
    before = {name: m.weight.detach().clone() for name, m in linears.items()}
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=1e-2, weight_decay=0.1)
    ids = torch.arange(5, 25).reshape(2, 10)
    with zeros_held(model):
        for _ in range(3):
            optimizer.zero_grad()
            model.module(input_ids=ids, labels=ids).loss.backward()
            grads = [(before[n], m.weight.grad) for n, m in linears.items()]
            assert all(not g[w == 0].any() and g[w != 0].any() for w, g in grads)
            optimizer.step()
    assert not broken_promise(model, model.formats)
    assert all(not torch.equal(m.weight, before[n]) for n, m in linears.items())
    model.module(input_ids=ids, labels=ids).loss.backward()  # outside, gradients are whole again
    name, linear = next(iter(linears.items()))
    assert linear.weight.grad[before[name] == 0].any()


def test_undivided_layers_are_named(pico_llama):
    linears = prunable(pico_llama())
    refuse_undivided(linears, "2:4")
    with pytest.raises(CompressError, match=r"5 inputs of 'odd'"):
        refuse_undivided({"odd": nn.Linear(5, 4)}, "2:4")


def test_more_zeros_than_promised_are_no_harm(pico_llama):
    model = sparse(pico_llama())
    name, linear = next(iter(prunable(model).items()))
    linear.weight.data[:] = 0
    assert not broken_promise(model, model.formats)
    more = dataclasses.replace(model.formats[name], pattern="unstructured", sparsity=1.0)
    assert not broken_promise(model, {name: more})
