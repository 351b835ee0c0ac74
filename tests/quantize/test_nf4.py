"""NF4 against bitsandbytes and against the formula; what a model keeps of it."""

import bitsandbytes.functional as bnb
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compressor.errors import CompressError
from compressor.export import safetensors
from compressor.model.checkpoint import load_directory
from compressor.model.forward import outputs
from compressor.model.layers import QuantLinear
from compressor.model.manifest import WeightFormat
from compressor.model.saving import save
from compressor.numerics.codebook import NF4
from compressor.numerics.codebook import nf4 as round_to_nf4
from compressor.quantize import nf4

BATCH = {
    "input_ids": torch.arange(5, 25).reshape(2, 10),
    "attention_mask": torch.ones(2, 10, dtype=torch.long),
}


def weights(rows=24, columns=192, group=64, exact=False):
    """Normal weights; with `exact` the largest of every group is a float16."""
    draw = torch.Generator().manual_seed(3)
    w = torch.randn(rows, columns, generator=draw) * 0.02
    if exact:
        groups = w.view(rows, -1, group)
        top, place = groups.abs().max(-1, keepdim=True)
        groups.scatter_(-1, place, top.half().float().copysign(groups.gather(-1, place)))
        # halved, rounding never makes another weight the largest of its group
        others = torch.ones_like(groups).scatter_(-1, place, 0).bool()
        groups[others] /= 2
    return w


def of_bitsandbytes(w):
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    both = packed.flatten()
    codes = torch.stack([both >> 4, both & 15], dim=-1).flatten().view(w.shape)
    return codes, state, bnb.dequantize_4bit(packed, state)


def test_codes_are_those_of_bitsandbytes():
    w = weights(exact=True)
    codes, scale = round_to_nf4(w, 64)
    wanted, state, _ = of_bitsandbytes(w)
    assert torch.equal(scale.float().flatten(), state.absmax)
    assert torch.equal(codes, wanted)


def test_rounded_scales_cost_next_to_nothing():
    w = weights()
    codes, scale = round_to_nf4(w, 64)
    ours = torch.tensor(NF4)[codes.long()] * scale.float().repeat_interleave(64, dim=1)
    _, state, theirs = of_bitsandbytes(w)
    assert bool((scale.float().flatten() >= state.absmax).all())
    errors = [float((found - w).norm() / w.norm()) for found in (ours, theirs)]
    assert errors[0] < 1.001 * errors[1] and 0.08 < errors[1] < 0.11


def test_every_code_is_the_nearest_point():
    w = weights(4, 32).double()
    codes, scale = round_to_nf4(w, 16)
    points, grid = torch.tensor(NF4).double(), scale.double().repeat_interleave(16, dim=1)
    distance = (w[..., None] - points * grid[..., None]).abs()
    chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
    assert bool((chosen <= distance.min(-1).values + 1e-9).all())
    assert bool((w.abs() <= grid).all())


def test_zeros_stay_zero():
    w = weights(4, 64)
    w[:, ::2] = 0
    w[0] = 0
    codes, scale = round_to_nf4(w, 16)
    values = torch.tensor(NF4)[codes.long()]
    assert not values[:, ::2].any() and not values[0].any() and bool((scale[0] == 1).all())


def quantized(model, make_work, **settings):
    nf4.run(model, nf4.Options(**{"group": 16} | settings), make_work())
    return model


def test_a_model_of_it_comes_back_from_disk(pico_llama, make_work, tmp_path):
    model, before = pico_llama(tie_word_embeddings=True), pico_llama(tie_word_embeddings=True)
    quantized(model, make_work)
    name = "model.layers.0.mlp.down_proj"
    layer = model.module.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    assert model.formats[name] == WeightFormat(bits=4, group=16, codebook="nf4")
    codes, _ = round_to_nf4(before.module.get_submodule(name).weight.detach(), 16)
    assert torch.equal(codes, layer.codes_OI)
    wanted = outputs(before, BATCH)["logits"]
    assert float((outputs(model, BATCH)["logits"] - wanted).norm() / wanted.norm()) < 0.5
    save(model, tmp_path, tmp_path)
    assert (tmp_path / "packed.safetensors").is_file()
    again = load_directory(tmp_path, model.formats)
    state, wanted = again.module.state_dict(), model.module.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[k], wanted[k]) for k in state)
    assert again.module.lm_head.codes_OI is again.module.get_input_embeddings().codes_OI


def test_dense_weights_of_it_open_anywhere(pico_bert, make_work, tmp_path):
    model = quantized(pico_bert(), make_work)
    safetensors.run(model, safetensors.Options(), tmp_path)
    dense = load_directory(tmp_path, {})
    wanted, got = outputs(model, BATCH), outputs(dense, BATCH)
    for key, value in wanted.items():
        assert torch.allclose(got[key], value, atol=1e-5)


def test_what_it_has_not_is_refused(pico_llama, make_work):
    for wrong in ({"bits": 3}, {"symmetric": False}):
        with pytest.raises(ValidationError):
            nf4.Options(**wrong)
    with pytest.raises(CompressError, match="group 64 does not divide the 32 inputs"):
        nf4.run(pico_llama(), nf4.Options(), make_work())
    large = pico_llama()
    layer = large.module.model.layers[0].mlp.up_proj
    assert isinstance(layer, nn.Linear)
    layer.weight.data[0, 0] = 70_000
    with pytest.raises(CompressError, match="overflows float16"):
        quantized(large, make_work)
