"""The spike-driven transformer: conversion, folding, unrolling, loading, what it refuses, costs."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from compressor.errors import CompressError
from compressor.model.checkpoint import load_directory
from compressor.model.forward import outputs
from compressor.model.qsd_config import QsdTransformerConfig
from compressor.model.qsd_convert import fold, make_spiking
from compressor.model.qsd_cost import spike_cost, vit_products
from compressor.model.qsd_layers import Neuron, SpikeNorm
from compressor.model.shapes import config_of
from families import pico
from spiking import images, quantized, spiking


@pytest.mark.parametrize("levels", [1, 3, 4])
@pytest.mark.parametrize("time_steps", [1, 2])
@pytest.mark.parametrize("backbone", ["vit", "stages"])
def test_binary_spikes_give_the_very_answers_of_integers(backbone, time_steps, levels):
    """Bit for bit: sums of integers are exact in any order."""
    model = quantized(backbone, levels=levels, time_steps=time_steps)
    batch = images(model)
    integers = outputs(model, batch)["logits"]
    model.config.unrolled = True
    assert torch.equal(outputs(model, batch)["logits"], integers)
    assert len(integers.unique()) > 5


def test_unrolled_passes_are_binary(monkeypatch):
    model, seen = quantized(unrolled=True), []
    whole = type(model.module.classifier).integer_sums

    def watched(layer, passes):
        seen.append(passes.unique().tolist())
        return whole(layer, passes)

    monkeypatch.setattr(type(model.module.classifier), "integer_sums", watched)
    outputs(model, images(model))
    assert all(set(values) <= {0.0, 1.0} for values in seen[1:])  # the first reads pixels


@pytest.mark.parametrize("backbone", ["vit", "stages"])
def test_folded_norms_change_nothing(backbone):
    model = spiking(backbone)
    before = outputs(model, images(model))["logits"]
    fold(model)
    assert not any(isinstance(m, SpikeNorm) for m in model.module.modules())
    assert torch.equal(outputs(model, images(model))["logits"], before)


def test_a_folded_neuron_compares_with_thresholds():
    model = spiking(levels=4)
    fold(model)
    neuron = model.module.qsd.layers[1].neuron_after
    gain, shift = neuron.norm.gain.double(), neuron.norm.shift.double()
    x = torch.randn(50, 3, 32, generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros_like(x)
    for level in range(1, 5):
        threshold = (level - 0.5 - 4 * shift) / (4 * gain)
        wanted += torch.where(gain > 0, x >= threshold, x <= threshold)
    assert torch.equal(neuron(x), wanted)


def test_norms_use_the_batch_while_they_learn_and_their_own_numbers_otherwise():
    norm = SpikeNorm(4, 1e-5).train()
    x = torch.randn(8, 5, 4) * 3 + 1
    reference = nn.BatchNorm1d(4, eps=1e-5)
    reference.weight.data.fill_(0.5)
    wanted = reference(x.flatten(0, 1)).view(x.shape)
    torch.testing.assert_close(norm(x), wanted)
    torch.testing.assert_close(norm.running_var, reference.running_var)
    norm.eval()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            torch.testing.assert_close(norm(x), reference.eval()(x.flatten(0, 1)).view(x.shape))


def test_weights_of_a_vit_go_over():
    vit = pico("vit")
    model = pico("vit")
    make_spiking(model, 2, 3, False)
    own, given = model.module, vit.module
    patches = given.vit.embeddings.patch_embeddings.projection
    x = torch.randn(2, 3, 16, 16)
    cut = patches(x).flatten(2).transpose(1, 2)
    first = given.vit.embeddings.cls_token.expand(2, -1, -1)
    wanted = torch.cat([first, cut], dim=1) + given.vit.embeddings.position_embeddings
    torch.testing.assert_close(own.qsd.embeddings(x), wanted)
    for block, source in zip(own.qsd.layers, given.vit.layers, strict=True):
        assert torch.equal(block.attention.q_proj.weight, source.attention.q_proj.weight)
        assert torch.equal(block.mlp.fc2.bias, source.mlp.fc2.bias)
        assert torch.equal(block.neuron_after.norm.weight, source.layernorm_after.weight * 0.5)
    assert torch.equal(own.classifier.weight, given.classifier.weight)
    assert (model.config.time_steps, model.config.levels) == (2, 3)
    assert model.family.model_type == "qsd_transformer" and model.sizes["head_dim"] == 8


def test_a_vit_without_its_first_head_dim():
    """Heads that were pruned away: width of attention and of the stream differ."""
    model = pico("vit", num_attention_heads=2, head_dim=8)
    make_spiking(model, 1, 4, False)
    assert model.module.qsd.layers[0].attention.o_proj.weight.shape == (32, 16)


@pytest.mark.parametrize("backbone", ["vit", "stages"])
def test_transformers_saves_and_loads_it(backbone, tmp_path):
    model = spiking(backbone)
    model.module.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), QsdTransformerConfig)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    batch = {"pixel_values": images(model)["pixel_values"]}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, outputs(model, batch)["logits"])
    bare = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(bare(**batch).last_hidden_state, model.module.qsd(**batch)[0])
    again = load_directory(tmp_path)
    assert torch.equal(outputs(again, batch)["logits"], outputs(model, batch)["logits"])
    assert load_file(tmp_path / "model.safetensors").keys() == model.module.state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"levels": 0}, "at least 1"),
        ({"time_steps": 0}, "at least 1"),
        ({"levels": None, "unrolled": True}, "unrolled needs levels"),
        ({"backbone": "cnn"}, "vit or stages"),
        ({"backbone": "stages", "widths": [8, 16]}, "widths"),
        ({"backbone": "stages", "widths": [8, 16, 24, 30]}, "4 heads"),
    ],
)
def test_configs_that_make_no_network_are_refused(changes, said):
    raw = QsdTransformerConfig().to_dict() | changes
    with pytest.raises(CompressError, match=said):
        config_of(raw)


def test_images_of_another_size_are_refused():
    model = spiking()
    with pytest.raises(CompressError, match="3 x 20 x 16") as caught:
        model.module(torch.zeros(1, 3, 20, 16))
    assert "image_size" in caught.value.hint


@pytest.mark.parametrize("backbone", ["vit", "stages"])
def test_additions_are_those_of_brute_force(backbone):
    """Every spike of every pass, times the outputs that read it; borders of kernels aside."""
    model = quantized(backbone, levels=3, time_steps=2)
    batch, total, kept = images(model), 0.0, {}
    neurons = [m for m in model.module.modules() if isinstance(m, Neuron)]
    hooks = [
        m.register_forward_hook(lambda m, x, y: kept.__setitem__(id(m), float(y.sum())))
        for m in neurons
    ]
    found = spike_cost(model, [batch])
    [hook.remove() for hook in hooks]
    for block in model.module.qsd.layers:
        attention, mlp = block.attention, block.mlp
        width = attention.q_proj.out_features
        readers = {
            block.neuron_before: 3 * width,
            attention.q_neuron: width // 4,
            attention.k_neuron: width // 4,
            attention.out_neuron: attention.o_proj.out_features,
            block.neuron_after: mlp.fc1.out_features,
            mlp.neuron: mlp.fc2.out_features,
        }
        total += sum(kept[id(neuron)] * fan for neuron, fan in readers.items())
    total += kept[id(model.module.neuron)] * 5
    if backbone == "vit":
        assert found["ac"] == pytest.approx(total / 6)
        assert found["mac"] == 16 * 48 * 32
        assert found["energy_nj"] == pytest.approx((4.6 * 16 * 48 * 32 + 0.9 * total / 6) / 1000)
    else:
        assert found["ac"] > total / 6 and found["mac"] == 16 * 16 * 3 * 49 * 2
    assert 0 < found["firing_rate"] < 1


def test_products_of_a_vit_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    vit = pico("vit", attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        vit.module(pixel_values=torch.zeros(1, 3, 16, 16))
    assert 2 * vit_products(vit.config) == counter.get_total_flops()


def test_a_model_that_rounds_thresholds_to_its_dtype_survives_saving():
    model = spiking()
    model.source_dtype = "bfloat16"
    fold(model)
    before = copy.deepcopy(model.module.state_dict())
    assert all(torch.equal(v, v.bfloat16().float()) for v in before.values())
