"""GPTQ against the paper in float64, with masks, jointly sparse, ties and mixed bits."""

import gc
import itertools
import re
import weakref
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from compressor.errors import CompressError
from compressor.model.checkpoint import load_directory
from compressor.model.forward import outputs
from compressor.model.layers import QuantLinear
from compressor.model.moments import Moments, mask_keys
from compressor.model.saving import save
from compressor.model.sparse import broken_promise, prunable
from compressor.numerics.clipping import clipped_grid
from compressor.numerics.quantizer import dequantize, encode, grid, quantize
from compressor.numerics.solver import output_energy
from compressor.prune import magnitude
from compressor.quantize import awq, gptq, rtn
from compressor.quantize.mixed import allot, refuse_small
from compressor.quantize.weights import Mixed
from families import CONFIGS, pico, random_inputs
from gptq_reference import by_the_book

DATA = {"samples": 16, "length": 16, "group": 16}


def quantized(model, make_work, **options):
    gptq.run(model, gptq.Options(**DATA | options), make_work())
    return model


def first_layers(model, make_work):
    """Names, weights and Hessian of the layers of the first block that read one input."""
    linears = {n: m for n, m in prunable(model).items() if ".0." in n and "q_proj" in n}
    moments = Moments(linears, mask_keys(model), whole=True)
    for batch in make_work().batches("calibration", 2, batch=8, length=16):
        with moments.watching(batch):
            model.module(**batch)
    (name,) = linears
    return name, linears[name].weight.detach().clone(), moments.pop(name)


@pytest.mark.parametrize("order", ["activation", "input"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False), (2, False)])
def test_a_layer_is_that_of_the_paper(pico_llama, make_work, order, bits, symmetric):
    name, w, h = first_layers(pico_llama(), make_work)
    given = {"bits": bits, "symmetric": symmetric}
    model = quantized(pico_llama(), make_work, order=order, embeddings=False, head=False, **given)
    got = model.module.get_submodule(name).weight
    wanted = by_the_book(w, h, bits, 16, symmetric, order == "activation")
    ours, papers = (output_energy(w - new.float(), h) for new in (got, wanted))
    assert ours == pytest.approx(papers, rel=0.02)
    assert float((got - wanted.float()).abs().gt(1e-4).float().mean()) < 0.02
    plain = dequantize(*quantize(w, bits, 16, symmetric))
    assert ours < 0.9 * output_energy(w - plain, h)
    assert model.notes["quantization"][name]["error"] == pytest.approx(
        ours / output_energy(w, h), rel=1e-4
    )


@pytest.mark.parametrize("order", ["activation", "input"])
def test_grids_are_clipped_where_the_paper_makes_them(pico_llama, make_work, order):
    name, w, h = first_layers(pico_llama(), make_work)
    losses = []
    for clip, choose in {"none": grid, "mse": clipped_grid}.items():
        given = {"bits": 3, "order": order, "clip": clip, "embeddings": False, "head": False}
        model = quantized(pico_llama(), make_work, **given)
        got = model.module.get_submodule(name).weight
        wanted = by_the_book(w, h, 3, 16, True, order == "activation", choose)
        assert float((got - wanted.float()).abs().gt(1e-4).float().mean()) < 0.02
        losses.append(output_energy(w - got, h))
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("t5", "bfloat16")])
def test_offload_gives_the_same_codes_and_keeps_them_in_files(name, dtype, make_work, tmp_path):
    source = pico(name)
    source.source_dtype = dtype
    save(source, tmp_path, tmp_path)
    batches, found = [random_inputs(source, seed=seed) for seed in range(2)], []
    work = replace(make_work(), _batches=lambda split, n, **shape: batches)
    for spill in (None, work.scratch):
        model = load_directory(tmp_path, None, spill)
        gptq.run(model, gptq.Options(**DATA, uneven="channel", offload=spill is not None), work)
        for layer in prunable(source):
            codes = model.module.get_submodule(layer).codes_OI
            assert (codes.untyped_storage().filename is not None) == (spill is not None)
        found.append((model.module.state_dict(), model.formats, model.notes))
    (plain, *rest), (spilled, *others) = found
    assert rest == others and plain.keys() == spilled.keys()
    assert all(torch.equal(x, spilled[key]) for key, x in plain.items())
    assert not list(work.scratch.iterdir())  # the disk has everything back


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_quantized_and_stays_close(name, make_work):
    model, dense = pico(name), pico(name)
    batches = [random_inputs(dense, seed=seed) for seed in range(2)]
    work = replace(make_work(), _batches=lambda split, n, **shape: batches)
    gptq.run(model, gptq.Options(**DATA, bits=8, uneven="channel"), work)
    for layer in prunable(dense):
        assert isinstance(model.module.get_submodule(layer), QuantLinear)
        assert model.notes["quantization"][layer]["error"] < 1e-3
    for key, wanted in outputs(dense, batches[0]).items():
        assert float((outputs(model, batches[0])[key] - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("order", ["activation", "input"])
def test_promised_zeros_stay(pico_llama, make_work, order):
    model = pico_llama()
    magnitude.run(model, magnitude.Options(pattern="2:4"), make_work())
    promised = dict(model.formats)
    zeros = {n: m.weight == 0 for n, m in prunable(model).items()}
    quantized(model, make_work, bits=3, symmetric=False, order=order)
    assert not broken_promise(model, promised)
    for name, mask in zeros.items():
        weight = model.module.get_submodule(name).weight
        assert not weight[mask].any()
        assert (model.formats[name].pattern, model.formats[name].bits) == ("2:4", 3)


@pytest.mark.parametrize("sparse", [{"pattern": "2:4"}, {"sparsity": 0.5}])
def test_sparse_and_quantized_in_one_pass(pico_llama, make_work, sparse):
    model = quantized(pico_llama(), make_work, sparse=sparse)
    pattern = sparse.get("pattern", "unstructured")
    for name in prunable(pico_llama()):
        form = model.formats[name]
        assert (form.pattern, form.bits) == (pattern, 4)
        assert form.sparsity >= 0.5
    assert not broken_promise(model, model.formats)


def test_a_pattern_needs_the_order_of_inputs():
    with pytest.raises(ValidationError, match="needs order: input"):
        gptq.Options(order="activation", sparse={"pattern": "2:4"})


def test_head_and_embeddings_are_rounded_to_nearest(pico_llama, make_work):
    model, plain = quantized(pico_llama(), make_work), pico_llama()
    rtn.run(plain, rtn.Options(bits=4, group=16), make_work())
    for name in ("lm_head", "model.embed_tokens"):
        assert torch.equal(
            model.module.get_submodule(name).weight, plain.module.get_submodule(name).weight
        )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8])
def test_clipping_is_the_search_by_brute_force(symmetric, group):
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) ** 3
    width = group or 32
    cost = lambda part, *made: float((dequantize(*made) - part).abs().pow(2.4).sum())  # noqa: E731
    scale, zero = clipped_grid(w, 3, group, symmetric)
    total = 0.0
    for o, g in itertools.product(range(6), range(32 // width)):
        part = w[o : o + 1, g * width : (g + 1) * width]
        grids = [grid(part * (1 - step / 100), 3, None, symmetric) for step in range(81)]
        best = min(cost(part, encode(part, *made, 3), *made) for made in grids)
        own = scale[o : o + 1, g : g + 1], zero[o : o + 1, g : g + 1]
        assert cost(part, encode(part, *own, 3), *own) == pytest.approx(best, rel=1e-5)
        total += best
    assert total < cost(w, *quantize(w, 3, group, symmetric))


def test_bits_are_allotted_as_well_as_by_brute_force():
    errors = [[0.5, 0.2, 0.01], [0.4, 0.35, 0.0], [0.9, 0.1, 0.05]]
    sizes = [[2, 4, 8]] * 3
    for budget in range(6, 25):
        chosen = allot(errors, sizes, budget)
        assert sum(sizes[i][k] for i, k in enumerate(chosen)) <= budget
        best = min(
            sum(errors[i][k] for i, k in enumerate(way))
            for way in itertools.product(range(3), repeat=3)
            if sum(sizes[i][k] for i, k in enumerate(way)) <= budget
        )
        # greedy misses the best where the last step does not fit, by less than that step
        assert sum(errors[i][k] for i, k in enumerate(chosen)) <= best + 0.4


def test_mixed_bits_meet_their_budget(pico_llama, make_work):
    model = quantized(pico_llama(), make_work, mixed={"average_bits": 6.0})
    bits = {model.formats[name].bits for name in model.formats}
    assert len(bits) > 1
    assert bits <= {2, 4, 8}
    tables = [m for m in model.module.modules() if hasattr(m, "codes_OI")]
    size = sum(t.codes_OI.numel() * t.bits / 8 + t.scale_OG.numel() * 2 for t in tables)
    assert 8 * size / sum(t.codes_OI.numel() for t in tables) <= 6.0
    with pytest.raises(CompressError, match="2 bits for every layer take"):
        quantized(pico_llama(), make_work, mixed={"bytes": 100})


def gains(model, batch):
    """{Linear: what it loses in 2 bits and not in 8}, by the inputs it reads, in float64."""
    found, hooks = {}, []
    for name, linear in prunable(model).items():

        def read(module, args, name=name):
            h = args[0][batch["attention_mask"].bool()].double().square().mean(0)
            w = module.weight.detach()
            off = [dequantize(*quantize(w, bits, 16, True)).double() - w for bits in (2, 8)]
            low, high = (float((each.square() @ h).sum()) for each in off)
            found[name] = (low - high) / float((w.double().square() @ h).sum())

        hooks.append(linear.register_forward_pre_hook(read))
    outputs(model, batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("loud", ["input_layernorm", "post_attention_layernorm"])
def test_mixed_bits_go_where_the_inputs_of_coarse_weights_are_large(pico_llama, make_work, loud):
    """Three of seven equal layers get 8 bits, the best three; weights are alike in both cases."""
    model = pico_llama(num_hidden_layers=1, num_key_value_heads=4, intermediate_size=32)
    for name, linear in prunable(model).items():
        if "o_proj" not in name and "down_proj" not in name:
            linear.weight.data[:, ::16] *= 20  # the others of its group become coarse
    getattr(model.module.model.layers[0], loud).weight.data[1:16] *= 30
    (batch,) = make_work().batches("calibration", 1, batch=8, length=16)
    gained = gains(model, batch)
    mixed = {"average_bits": 5.6, "choices": (2, 8)}  # 3 x 9 + 4 x 3 with scales: 5.57
    quantized(model, make_work, samples=8, mixed=mixed, embeddings=False, head=False)
    best = sorted(gained, key=gained.__getitem__)[-3:]
    bits = model.notes["bits"]
    assert {name for name in bits if bits[name] == 8} == set(best)


@pytest.mark.parametrize("method", [rtn, gptq])
def test_errors_are_estimated_without_touching_the_weights(pico_llama, make_work, method):
    """8 bits for all by a budget are 8 bits for all by option."""
    found = []
    for bits in ({"mixed": {"average_bits": 9.0}}, {"bits": 8}):
        model = pico_llama()
        data = {} if method is rtn else DATA
        method.run(model, method.Options(**{**data, "group": 16, **bits}), make_work())
        tables = {n: m.weight for n, m in model.module.named_modules() if hasattr(m, "codes_OI")}
        found.append(tables)
    for name, weight in found[1].items():
        assert torch.equal(found[0][name], weight), name


def test_a_budget_is_given_once():
    with pytest.raises(ValidationError, match="exactly one"):
        Mixed(average_bits=4, bytes=100)


@pytest.mark.parametrize("given", [{"average_bits": 2.1}, {"bytes": 100}])
def test_the_least_budget_that_is_named_does(given, pico_llama):
    with pytest.raises(CompressError, match="2 bits for every layer take") as caught:
        refuse_small(pico_llama(), gptq.Options(**DATA, mixed=given))
    (key,) = given
    found = re.match(rf"mixed\.{key}: ([\d.]+) or more, or a larger group$", caught.value.hint)
    assert found
    refuse_small(pico_llama(), gptq.Options(**DATA, mixed={key: float(found[1])}))


def test_choices_are_different_and_fit_integer_products():
    with pytest.raises(ValidationError, match="two different"):
        Mixed(average_bits=4, choices=(4, 4))
    assert Mixed(average_bits=4, choices=(8, 4, 8)).rising == [4, 8]
    channels = {"bits": 8, "group": None, "activation": "token"}
    rtn.Options(**channels)
    with pytest.raises(ValidationError, match="leave mixed out"):
        rtn.Options(**channels, mixed={"average_bits": 5})


@pytest.mark.parametrize("method", [gptq, awq])
def test_float_weights_of_finished_blocks_are_let_go(method, pico_llama, make_work, monkeypatch):
    model = pico_llama()
    floats = [weakref.ref(linear) for linear in prunable(model).values()]
    alive, place = [], method.place

    def placed(*args, **form):
        gc.collect()
        alive.append(sum(linear() is not None for linear in floats))
        place(*args, **form)

    monkeypatch.setattr(method, "place", placed)
    method.run(model, method.Options(**DATA), make_work())
    blocks, layers = len(model.blocks(model.family.stacks[0])), len(floats)
    assert blocks > 1
    assert alive == [layers - i // (layers // blocks) * (layers // blocks) for i in range(layers)]
