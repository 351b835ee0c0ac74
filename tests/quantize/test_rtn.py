"""Round to nearest on pico models: what is replaced, what is refused, what comes back from disk."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compressor.errors import CompressError
from compressor.model import layers
from compressor.model.checkpoint import load_directory
from compressor.model.forward import outputs
from compressor.model.layers import QuantEmbedding, QuantLinear
from compressor.model.manifest import WeightFormat
from compressor.model.saving import save
from compressor.model.stored import quantized_state
from compressor.numerics.quantizer import dequantize, quantize
from compressor.quantize import rtn
from compressor.quantize.weights import refuse_no_tables
from families import pico, random_inputs

BATCH = {
    "input_ids": torch.arange(5, 25).reshape(2, 10),
    "attention_mask": torch.ones(2, 10, dtype=torch.long),
}


def quantized(model, make_work, **options):
    rtn.run(model, rtn.Options(**{"group": 16, **options}), make_work())
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_hold_the_quantizers_numbers(pico_llama, make_work, bits, symmetric):
    named = pico_llama().module.named_modules()
    before = {n: m.weight.clone() for n, m in named if isinstance(m, nn.Linear)}
    model = quantized(pico_llama(), make_work, bits=bits, symmetric=symmetric)
    for name, weight in before.items():
        found = model.module.get_submodule(name)
        assert isinstance(found, QuantLinear)
        assert torch.equal(found.weight, dequantize(*quantize(weight, bits, 16, symmetric)))
        assert model.formats[name] == WeightFormat(bits=bits, group=16, symmetric=symmetric)
    assert isinstance(model.module.get_input_embeddings(), QuantEmbedding)


def test_eight_bits_keep_the_function(pico_llama, pico_bert, make_work):
    for build in (pico_llama, pico_bert):
        wanted = outputs(build(), BATCH)
        got = outputs(quantized(build(), make_work), BATCH)
        for name, value in wanted.items():
            assert float((got[name] - value).norm() / value.norm()) < 0.05


def test_forward_is_the_dense_model_with_the_same_weights(pico_llama, make_work):
    model, dense = quantized(pico_llama(), make_work, bits=4), pico_llama()
    for name, module in dense.module.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.copy_(model.module.get_submodule(name).weight)
    wanted = outputs(dense, BATCH)["logits"]
    assert torch.allclose(outputs(model, BATCH)["logits"], wanted, atol=1e-5)


def test_embeddings_and_head_may_stay_float(pico_llama, make_work):
    model = quantized(pico_llama(), make_work, embeddings=False, head=False)
    assert isinstance(model.module.lm_head, nn.Linear)
    assert isinstance(model.module.get_input_embeddings(), nn.Embedding)
    assert "model.layers.0.mlp.down_proj" in model.formats
    assert "lm_head" not in model.formats


@pytest.mark.parametrize("tied", [True, False])
def test_tables_may_have_bits_of_their_own(pico_llama, make_work, tied):
    model = pico_llama(tie_word_embeddings=tied)
    rtn.run(model, rtn.Options(bits=4, group=16, table_bits=8), make_work())
    tables = {"model.embed_tokens", "lm_head"}
    assert tables < model.formats.keys()
    for name, form in model.formats.items():
        assert form.bits == (8 if name in tables else 4)
    alike = pico_llama(tie_word_embeddings=tied)
    rtn.run(alike, rtn.Options(bits=8, group=16), make_work())
    got, wanted = (m.module.get_input_embeddings().codes_OI for m in (model, alike))
    assert torch.equal(got, wanted)


def test_clip_takes_the_grid_with_the_smallest_error(pico_llama, make_work):
    """Of p max|w| / 3.5 in float64, p = 1, 0.99, ..., 0.2, for every group of every Linear."""
    model, before = pico_llama(), pico_llama()
    quantized(model, make_work, bits=3, clip="mse", embeddings=False)
    for name in model.formats:
        found, w = (
            m.module.get_submodule(name).weight.detach().double().view(-1, 16)
            for m in (model, before)
        )
        costs = []
        for step in range(81):
            scale = (1 - step / 100) * w.abs().amax(1, keepdim=True) / 3.5
            off = (w / scale).round().clamp(-4, 3) * scale - w
            costs.append(off.abs().pow(2.4).sum(1))
        best, cost = torch.stack(costs).amin(0), (found - w).abs().pow(2.4).sum(1)
        assert bool((cost < 1.02 * best).all())  # scales are float16
        assert float(best.sum()) < 0.95 * float(costs[0].sum())


@pytest.mark.parametrize(
    "other", [{"mixed": {"average_bits": 5.0}}, {"embeddings": False, "head": False}]
)
def test_bits_of_tables_without_effect_are_refused(other):
    with pytest.raises(ValidationError, match="table_bits"):
        rtn.Options(table_bits=8, **other)


def test_pruning_facts_survive(pico_bert, make_work):
    model = pico_bert()
    name = "encoder.layer.0.output.dense"
    model.formats[name] = WeightFormat(pattern="2:4", sparsity=0.5)
    quantized(model, make_work)
    assert (model.formats[name].pattern, model.formats[name].bits) == ("2:4", 8)


def test_a_tied_table_is_shared(pico_llama, make_work):
    model = quantized(pico_llama(tie_word_embeddings=True), make_work)
    head, table = model.module.lm_head, model.module.get_input_embeddings()
    assert head.codes_OI is table.codes_OI
    assert head.scale_OG is table.scale_OG


def test_dynamic_activation_rounds_activations(pico_bert, make_work):
    model = quantized(pico_bert(), make_work, group=None, activation="dynamic")
    activation = model.formats["encoder.layer.0.output.dense"].activation
    assert activation == {"bits": 8, "per": "tensor", "dynamic": True}
    assert model.formats["embeddings.word_embeddings"].activation is None
    wanted, got = outputs(pico_bert(), BATCH), outputs(model, BATCH)
    error = got["last_hidden_state"] - wanted["last_hidden_state"]
    assert 1e-4 < float(error.norm() / wanted["last_hidden_state"].norm()) < 0.1


def test_token_activations_leave_neighbours_alone(pico_bert, make_work):
    """With a scale per tensor a row depends on its batch; with one per token it does not."""
    differences = {}
    for activation in ("dynamic", "token"):
        model = quantized(pico_bert(), make_work, group=None, activation=activation)
        alone = outputs(model, {key: x[:1] for key, x in BATCH.items()})["last_hidden_state"]
        whole = outputs(model, BATCH)["last_hidden_state"][:1]
        differences[activation] = float((alone - whole).norm() / whole.norm())
    assert differences["token"] < 1e-5 < 1e-4 < differences["dynamic"]
    assert model.formats["pooler.dense"].activation == {"bits": 8, "per": "token", "dynamic": True}


@pytest.mark.parametrize("wrong", [{"group": 16}, {"bits": 4}, {"symmetric": False}])
def test_dynamic_activation_needs_channels(wrong):
    with pytest.raises(ValidationError, match="needs bits: 8, group: null"):
        rtn.Options(**{"group": None, "activation": "dynamic"} | wrong)


def test_a_group_that_does_not_divide_is_refused(pico_llama, make_work):
    model = pico_llama()
    with pytest.raises(
        CompressError, match=r"32 does not divide the 48 inputs of '.*down_proj'"
    ) as e:
        quantized(model, make_work, group=32)
    assert "group: 16 or 24" in e.value.hint
    assert not model.formats
    assert isinstance(model.module.lm_head, nn.Linear)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_unsound_weights_are_refused(pico_bert, make_work, value):
    model = pico_bert()
    model.module.encoder.layer[1].output.dense.weight.data[0, 0] = value
    with pytest.raises(CompressError, match=r"encoder\.layer\.1\.output\.dense"):
        quantized(model, make_work)


def test_a_norm_that_is_no_number_is_refused_by_name(pico_llama, make_work):
    model = pico_llama()
    model.module.model.norm.weight.data[3] = float("nan")
    with pytest.raises(CompressError, match=r"'model\.norm\.weight' has NaN"):
        quantized(model, make_work)


def test_half_of_a_tie_is_refused(pico_llama, make_work):
    with pytest.raises(CompressError, match="share one table"):
        quantized(pico_llama(tie_word_embeddings=True), make_work, head=False)


def packed(model):
    return {n: lazy.make() for n, lazy in quantized_state(model.module, torch.float32).items()}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_disk_round_trip_is_exact(pico_llama, make_work, symmetric, tied):
    settings = {"tie_word_embeddings": tied}
    model = quantized(pico_llama(**settings), make_work, bits=4, symmetric=symmetric)
    tensors = packed(model)
    codes = tensors["model.layers.0.mlp.down_proj.codes_OI"]
    assert codes.shape == (32, 24)  # 48 inputs, two in a byte
    assert sum("codes_OI" in n and tensors[n].shape[0] == 96 for n in tensors) == (1 if tied else 2)
    fresh = pico_llama(seed=1, **settings)
    layers.install(fresh.module, model.formats)
    layers.state_from_disk(fresh.module, tensors)
    wanted, got = model.module.state_dict(), fresh.module.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert torch.equal(outputs(fresh, BATCH)["logits"], outputs(model, BATCH)["logits"])


def test_tensors_that_do_not_fit_are_refused(pico_bert, make_work):
    model = quantized(pico_bert(), make_work)
    tensors = packed(model)
    name = "encoder.layer.0.output.dense.scale_OG"
    for wrong in (
        {k: v for k, v in tensors.items() if k != name},
        tensors | {"stranger": torch.zeros(1)},
        tensors | {name: tensors[name][:, :1]},
        tensors | {name: tensors[name].float()},
    ):
        fresh = pico_bert()
        layers.install(fresh.module, model.formats)
        with pytest.raises(CompressError, match=r"stranger|scale_OG"):
            layers.state_from_disk(fresh.module, wrong)


def test_formats_that_name_no_module_are_refused(pico_bert):
    with pytest.raises(CompressError, match="no Linear or Embedding called 'encoder"):
        layers.install(pico_bert().module, {"encoder": WeightFormat(bits=8)})


def test_uneven_layers_can_have_one_scale_per_channel(pico_llama, make_work):
    model = pico_llama()
    rtn.run(model, rtn.Options(bits=4, group=32, uneven="channel"), make_work())
    groups = {name: form.group for name, form in model.formats.items()}
    assert {groups[n] for n in groups if n.endswith("down_proj")} == {None}  # 48 inputs
    assert {groups[n] for n in groups if not n.endswith("down_proj")} == {32}
    layer = model.module.model.layers[0].mlp.down_proj
    assert layer.scale_OG.shape == (32, 1)


def test_tables_in_few_bits_stand_beside_rounded_inputs(pico_llama, make_work, tmp_path):
    """An untied head of 4 bits keeps float inputs; integer products want 8."""
    model = pico_llama(tie_word_embeddings=False)
    settings = {"bits": 8, "group": None, "activation": "token", "table_bits": 4}
    rtn.run(model, rtn.Options(**settings), make_work())
    forms = {form.bits: form.activation for form in model.formats.values()}
    assert forms[4] is None and forms[8] == {"bits": 8, "per": "token", "dynamic": True}
    assert model.formats["lm_head"].bits == 4
    save(model, tmp_path, tmp_path)
    loaded = load_directory(tmp_path, model.formats)
    batch = random_inputs(model)
    assert torch.equal(outputs(loaded, batch)["logits"], outputs(model, batch)["logits"])


@pytest.mark.parametrize(("settings", "fits"), [((8, 2), False), ((2, 8), True)])
def test_the_bits_of_a_table_say_how_large_it_may_be(pico_llama, make_work, settings, fits):
    model = pico_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.module.lm_head.weight[0, 0] = 2e5
    options = rtn.Options(bits=settings[0], table_bits=settings[1], group=16)
    if fits:
        rtn.run(model, options, make_work())
        assert model.formats["lm_head"].bits == 8
        return
    with pytest.raises(CompressError, match="'lm_head' is so large that its scale overflows"):
        rtn.run(model, options, make_work())


def test_table_bits_want_a_table(make_work):
    options = rtn.Options(bits=4, table_bits=8, group=16)
    refuse_no_tables(pico("vit"), options)  # has a classifier
    with pytest.raises(CompressError, match="this vit has no embedding table and no head"):
        refuse_no_tables(pico("vit", head=False), options)
