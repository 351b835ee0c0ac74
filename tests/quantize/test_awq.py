"""AWQ on pico models: the search against brute force in float64, clipping, zeros, families."""

import pytest
import torch

from compressor.model.forward import outputs
from compressor.model.layers import QuantLinear
from compressor.model.scaling import fold_scale, folds
from compressor.model.sparse import broken_promise
from compressor.numerics.quantizer import dequantize, grid, quantize
from compressor.quantize import awq, rtn
from families import pico, random_inputs, sparse

FIRST = "model.layers.0."
BLOCKS = {"embeddings": False, "head": False}  # for those who compare with what floats give


def run(model, make_work, **given):
    options = {"bits": 3, "group": 16, "samples": 4, "length": 16}
    awq.run(model, awq.Options(**options | given), make_work())
    return model


def inputs_of(model, work, name):
    """What a Linear of the float model reads, real tokens only, float64."""
    seen = []
    module = model.module.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    (batch,) = work.batches("calibration", 1, batch=4, length=16)
    outputs(model, batch)
    hook.remove()
    return seen[0][batch["attention_mask"].bool()].double()


def reference_scales(x_TI, alpha):
    """As the reference implementation has it, for inputs that are not always zero."""
    s_I = (x_TI.abs().mean(0) ** alpha).clamp(min=1e-4)
    return s_I / (s_I.max() * s_I.min()).sqrt()


def rounded(w_OI, **given):
    return dequantize(*quantize(w_OI.float(), **given)).double()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("readers", ["self_attn.qkv", "mlp.gate up"])
def test_the_exponent_is_the_best_of_the_grid(pico_llama, make_work, readers, symmetric):
    """Outputs on the tokens themselves, in float64, for every exponent of the grid."""
    before, owner = pico_llama(), readers.partition(".")[0]
    names = {"mlp": ["gate_proj", "up_proj"], "self_attn": ["q_proj", "k_proj", "v_proj"]}[owner]
    names = [f"{FIRST}{owner}.{name}" for name in names]
    norm = {"mlp": "post_attention_layernorm", "self_attn": "input_layernorm"}[owner]
    model = run(pico_llama(), make_work, symmetric=symmetric, clip_search=False, **BLOCKS)
    x_TI = inputs_of(before, make_work(), names[0])
    errors = {}
    for alpha in (step / 20 for step in range(20)):
        s_I, total = reference_scales(x_TI, alpha), 0.0
        for name in names:
            w_OI = before.module.get_submodule(name).weight.detach().double()
            d_OI = rounded(w_OI * s_I, bits=3, group=16, symmetric=symmetric) / s_I - w_OI
            total += float((x_TI @ d_OI.T).square().mean(0).sum())
        errors[alpha] = total
    best = min(errors, key=lambda alpha: errors[alpha])
    assert len(set(errors.values())) > 10
    chosen = {model.notes["awq"][name]["alpha"] for name in names}
    assert chosen == {best}
    old, new = (m.module.get_submodule(FIRST + norm).weight.double() for m in (before, model))
    assert torch.allclose(old / new, reference_scales(x_TI, best), rtol=1e-5)


def test_clipping_is_the_best_ratio_of_every_group(pico_bert, make_work):
    """The MLP's output of BERT takes no scale: brute force over the ratios, group by group."""
    name = "encoder.layer.0.intermediate.dense"
    before = pico_bert()
    model = run(pico_bert(), make_work, group=8, **BLOCKS)
    # what it reads comes from attention, which is not yet quantized when the block is watched
    x_TI = inputs_of(before, make_work(), name)
    w_OI = before.module.get_submodule(name).weight.detach()
    got_OI = model.module.get_submodule(name).weight.double()
    clipped = 0
    for group in range(4):
        x_Tg, w_Og = x_TI[:, group * 8 :][:, :8], w_OI[:, group * 8 :][:, :8]
        errors = []
        for ratio in (1 - step / 20 for step in range(10)):
            bound_O1 = w_Og.abs().amax(1, keepdim=True) * ratio
            cut_Og = torch.minimum(torch.maximum(w_Og, -bound_O1), bound_O1)
            scale_O1, zero_O1 = (x.double() for x in grid(cut_Og, 3, None, False))
            codes_Og = ((w_Og / scale_O1).round() + zero_O1).clamp(0, 7)
            d_Og = (codes_Og - zero_O1) * scale_O1 - w_Og
            errors.append((x_Tg @ d_Og.T).square().sum(0))
        best_O = torch.stack(errors).amin(0)
        d_Og = got_OI[:, group * 8 :][:, :8] - w_Og.double()
        assert torch.allclose((x_Tg @ d_Og.T).square().sum(0), best_O, rtol=1e-4)
        clipped += int((torch.stack(errors).argmin(0) > 0).sum())
    assert clipped > 50  # of 256 groups


def test_large_inputs_get_finer_weights(pico_llama, make_work):
    """A few inputs 20 times as large, by a change of nothing else: AWQ finds them."""

    def outlying():
        model = pico_llama()
        for fold in folds(model):
            if "norm" in fold.source:
                s_I = torch.ones(32)
                s_I[[3, 20]] = 1 / 20
                fold_scale(model, fold, s_I)
        return model

    batch = random_inputs(pico_llama())
    wanted = outputs(pico_llama(), batch)["logits"]
    plain = outlying()
    rtn.run(plain, rtn.Options(bits=4, group=16, symmetric=False, **BLOCKS), make_work())
    models = [plain, run(outlying(), make_work, bits=4, clip_search=False, **BLOCKS)]
    errors = [float((outputs(m, batch)["logits"] - wanted).norm()) for m in models]
    assert errors[1] < 0.7 * errors[0]


def test_queries_and_keys_are_not_clipped(pico_llama, make_work):
    """Their rows are those of rounding the scaled weight as it is."""
    before, model = pico_llama(), run(pico_llama(), make_work)
    norm = f"{FIRST}input_layernorm"
    s_I = before.module.get_submodule(norm).weight / model.module.get_submodule(norm).weight
    for name, same in (("q_proj", True), ("k_proj", True)):
        old = before.module.get_submodule(f"{FIRST}self_attn.{name}").weight * s_I
        new = model.module.get_submodule(f"{FIRST}self_attn.{name}").weight
        wanted = dequantize(*quantize(old, 3, 16, False))
        assert torch.allclose(new, wanted, atol=2e-3) == same


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_formats_and_the_rest(pico_llama, make_work, bits, symmetric):
    model = run(pico_llama(tie_word_embeddings=True), make_work, bits=bits, symmetric=symmetric)
    assert len(model.formats) == 3 * 7 + 2
    assert {(f.bits, f.group, f.symmetric) for f in model.formats.values()} == {
        (bits, 16, symmetric)
    }
    table = pico_llama(tie_word_embeddings=True).module.lm_head.weight
    assert torch.equal(
        model.module.lm_head.weight, dequantize(*quantize(table, bits, 16, symmetric))
    )
    assert all(0 <= note["error"] < 1.5 for note in model.notes["awq"].values())


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "bert", "t5", "whisper", "vit"])
def test_every_family_stays_near_itself(make_work, name):
    model = pico(name)
    batch = random_inputs(model)
    wanted = outputs(model, batch)["logits"]
    work = make_work()
    object.__setattr__(work, "_batches", lambda split, n, **shape: [random_inputs(model, rows=4)])
    awq.run(model, awq.Options(bits=8, group=16, samples=4, length=16), work)
    inside = [m for s in model.family.stacks for b in model.blocks(s) for m in b.modules()]
    assert not any(isinstance(m, torch.nn.Linear) for m in inside)
    assert any(isinstance(m, QuantLinear) for m in inside)
    got = outputs(model, batch)["logits"]
    assert float((got - wanted).norm() / wanted.norm()) < 0.04


def test_zeros_of_a_pattern_stay(pico_llama, make_work):
    model = run(sparse(pico_llama()), make_work)
    assert not broken_promise(model, model.formats)
    assert model.formats["model.layers.0.mlp.up_proj"].pattern == "2:4"


def test_channels_where_the_group_does_not_divide(pico_llama, make_work):
    model = run(pico_llama(), make_work, group=32, uneven="channel")
    assert model.formats[f"{FIRST}mlp.down_proj"].group is None
    assert model.formats[f"{FIRST}mlp.up_proj"].group == 32
