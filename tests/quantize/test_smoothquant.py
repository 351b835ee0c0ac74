"""SmoothQuant on pico models: scales against the formula, activations, what cannot be smoothed."""

import pytest
import torch
from pydantic import ValidationError

from compressor.errors import CompressError
from compressor.model import layers
from compressor.model.forward import outputs
from compressor.model.layers import QuantLinear
from compressor.model.model import Model
from compressor.model.scaling import fold_scale, folds
from compressor.model.sparse import broken_promise
from compressor.model.stored import quantized_state
from compressor.numerics.quantizer import dequantize, quantize
from compressor.quantize import rtn, smoothquant
from families import pico, random_inputs, sparse

SAMPLES = {"samples": 4, "length": 16}
BLOCKS = {"embeddings": False, "head": False}  # for those who compare with what floats give


def smoothed(model, make_work, **given):
    smoothquant.run(model, smoothquant.Options(**SAMPLES | given), make_work())
    return model


def first_inputs(model: Model, work, name):
    """What a Linear of the float model reads from the calibration rows, real tokens only."""
    seen = []
    hook = model.module.get_submodule(name).register_forward_pre_hook(
        lambda m, args: seen.append(args[0])
    )
    batches = work.batches("calibration", 1, batch=4, length=16)
    for batch in batches:
        outputs(model, batch)
    hook.remove()
    pairs = zip(seen, batches, strict=True)
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in pairs]).double()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_first_block_has_the_scales_of_the_formula(pico_llama, make_work, alpha):
    before = pico_llama()
    x_TI = first_inputs(before, make_work(), "model.layers.0.self_attn.q_proj")
    block = before.module.model.layers[0]
    qkv = [getattr(block.self_attn, f"{n}_proj").weight.double() for n in "qkv"]
    w_I = torch.cat(qkv).abs().amax(0)
    wanted = x_TI.abs().amax(0) ** alpha / w_I ** (1 - alpha)
    model = smoothed(pico_llama(), make_work, alpha=alpha, **BLOCKS)
    after = model.module.model.layers[0]
    got = block.input_layernorm.weight.double() / after.input_layernorm.weight.double()
    assert torch.allclose(got, wanted, rtol=1e-5)
    found = after.self_attn.q_proj.weight
    scaled = (qkv[0] * wanted).float()
    assert torch.equal(after.self_attn.q_proj.codes_OI, quantize(scaled, 8, None, True)[0])
    assert torch.allclose(found, dequantize(*quantize(scaled, 8, None, True)), rtol=1e-3)


def test_static_ranges_are_those_of_the_smoothed_input(pico_llama, make_work):
    before = pico_llama()
    x_TI = first_inputs(before, make_work(), "model.layers.0.self_attn.q_proj")
    model = smoothed(pico_llama(), make_work, activation="static", **BLOCKS)
    first = model.module.model.layers[0]
    norm = before.module.model.layers[0].input_layernorm
    s_I = (norm.weight.double() / first.input_layernorm.weight.double()).detach()
    low, high = (x_TI / s_I).min().clamp(max=0), (x_TI / s_I).max().clamp(min=0)
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = first.self_attn.get_submodule(name)
        assert float(layer.input_scale) == pytest.approx(float((high - low) / 255), rel=1e-4)
        assert int(layer.input_zero) == pytest.approx(float(-low / (high - low) * 255), abs=0.51)


def outlying(model):
    """The same function with a few inputs of every norm's readers 30 times as large."""
    for fold in folds(model):
        if "norm" in fold.source or "ln_" in fold.source:
            s_I = torch.ones(len(fold.rows_I))
            s_I[[1, 7]] = 1 / 30
            fold_scale(model, fold, s_I)
    return model


def error(model, wanted):
    got = outputs(model, random_inputs(model))["logits"]
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("activation", ["token", "tensor", "static"])
def test_smoothing_takes_outliers_out_of_activations(pico_llama, make_work, activation):
    wanted = outputs(pico_llama(), random_inputs(pico_llama()))["logits"]
    plain = outlying(pico_llama())
    rtn.run(plain, rtn.Options(bits=8, group=None, activation="dynamic"), make_work())
    found = error(smoothed(outlying(pico_llama()), make_work, activation=activation), wanted)
    assert found < 0.5 * error(plain, wanted)
    assert found < (0.15 if activation == "static" else 0.06)  # tokens it never saw are cut


@pytest.mark.parametrize("unfolded", ["plain", "scale"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "bert", "t5", "whisper", "vit"])
def test_every_family_stays_near_itself(make_work, name, unfolded):
    model = pico(name)
    batch = random_inputs(model)
    wanted = outputs(model, batch)["logits"]
    work = make_work()
    object.__setattr__(work, "_batches", lambda split, n, **shape: [random_inputs(model, rows=4)])
    smoothquant.run(model, smoothquant.Options(**SAMPLES, unfolded=unfolded), work)
    got = outputs(model, batch)["logits"]
    assert float((got - wanted).norm() / wanted.norm()) < 0.08
    scaled = {n for n, f in model.formats.items() if f.activation and f.activation.get("scaled")}
    assert scaled == (set(model.notes["unfolded"]) if unfolded == "scale" else set())


def test_layers_that_cannot_be_smoothed_are_refused_or_named(pico_bert, make_work):
    with pytest.raises(CompressError, match=r"of 15 layers, 'encoder.layer.0.attention.self.que"):
        smoothed(pico_bert(), make_work, unfolded="refuse")
    model = smoothed(pico_bert(), make_work)
    assert len(model.notes["unfolded"]) == 15
    activation = {"bits": 8, "per": "token", "dynamic": True}
    inside = {n: f for n, f in model.formats.items() if n.startswith("encoder.")}
    assert len(inside) == 18 and all(f.activation == activation for f in inside.values())
    assert model.formats["pooler.dense"].activation is None


def test_a_factor_is_undone_by_the_weights(pico_bert, make_work):
    """Apart from rounding, a scaled layer is the float layer."""
    before = pico_bert().module.encoder.layer[0].intermediate.dense
    model = smoothed(pico_bert(), make_work, unfolded="scale")
    layer = model.module.encoder.layer[0].intermediate.dense
    assert float(layer.factor_I.std()) > 0.01
    rounding = layer.scale_OG.float() * layer.factor_I / 2
    assert bool(((layer.weight - before.weight).abs() <= rounding * 1.001).all())
    x = torch.randn(5, 32)
    assert float(((layer(x) - before(x)).norm() / before(x).norm()).detach()) < 0.02


@pytest.mark.parametrize("activation", ["token", "tensor", "static"])
@pytest.mark.parametrize("unfolded", ["plain", "scale"])
def test_disk_round_trip_is_exact(pico_bert, make_work, activation, unfolded):
    model = smoothed(pico_bert(), make_work, activation=activation, unfolded=unfolded)
    state = quantized_state(model.module, torch.bfloat16)
    tensors = {name: lazy.make() for name, lazy in state.items()}
    layer = "encoder.layer.0.output.dense"
    assert (f"{layer}.input_scale" in tensors) == (activation == "static")
    assert (f"{layer}.factor_I" in tensors) == (unfolded == "scale")
    fresh = pico_bert(seed=1)
    layers.install(fresh.module, model.formats)
    layers.state_from_disk(fresh.module, tensors)
    for name, module in model.module.named_modules():
        if isinstance(module, QuantLinear):
            again = fresh.module.get_submodule(name)
            for part in module.held:
                assert torch.equal(getattr(module, part), getattr(again, part)), (name, part)
    if activation == "static":
        wrong = tensors | {f"{layer}.input_scale": torch.ones((), dtype=torch.float16)}
        with pytest.raises(CompressError, match="input_scale"):
            layers.state_from_disk(fresh.module, wrong)


def test_zeros_of_a_pattern_stay(pico_llama, make_work):
    model = smoothed(sparse(pico_llama()), make_work)
    assert not broken_promise(model, model.formats)
    assert model.formats["model.layers.0.mlp.up_proj"].pattern == "2:4"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"group": 16}, "activation token needs bits: 8, group: null"),
        ({"bits": 4}, "Input should be 8"),
        ({"symmetric": False}, "Input should be True"),
    ],
)
def test_integer_products_need_channels(wrong, said):
    with pytest.raises(ValidationError, match=said):
        smoothquant.Options(**wrong)
