"""One-shot sparse pruning as a user meets it: which weights go, and what is refused."""

import itertools
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from compressor.errors import CompressError
from compressor.model.forward import outputs, run_backbone
from compressor.model.moments import Moments, mask_keys
from compressor.model.sparse import broken_promise, prunable
from compressor.numerics.solver import factorize, in_blocks, in_groups, output_energy, solve
from compressor.prune import ast, magnitude, sparsegpt, squarehead, wanda
from compressor.prune.allocation import curve, least_error
from compressor.run.machine import peak_memory, reset_peak_memory
from compressor.training.options import Train
from families import CONFIGS, pico, random_inputs


def made(method, **given):
    return TypeAdapter(method.Options).validate_python(given)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_magnitude_keeps_the_largest_of_every_layer(name, pattern, make_work):
    model, dense = pico(name), pico(name)
    magnitude.run(model, made(magnitude, pattern=pattern, sparsity=0.5), make_work())
    assert not broken_promise(model, model.formats)
    for layer, linear in prunable(dense).items():
        before, after = linear.weight.detach(), prunable(model)[layer].weight.detach()
        assert torch.equal(after[after != 0], before[after != 0])
        assert int((after == 0).sum()) == after.numel() // 2
        assert model.notes["sparsity"][layer]["sparsity"] == 0.5
        groups = (before.flatten(),) if pattern == "unstructured" else before.reshape(-1, 4)
        kept = (after.flatten(),) if pattern == "unstructured" else after.reshape(-1, 4)
        for old, new in zip(groups, kept, strict=True):
            assert old[new == 0].abs().max() <= old[new != 0].abs().min()


def test_a_weight_that_is_no_number_is_refused_by_name(pico_llama, make_work):
    model = pico_llama()
    name, linear = next(iter(prunable(model).items()))
    linear.weight.data[3, 5] = float("nan")
    with pytest.raises(CompressError, match=name):
        magnitude.run(model, made(magnitude, sparsity=0.5), make_work())


TRAINED = {"train": Train(steps=1, batch=2, length=8)}


@pytest.mark.parametrize(
    ("method", "given"),
    [(magnitude, {}), (wanda, {}), (sparsegpt, {}), (ast, TRAINED), (squarehead, TRAINED)],
)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_no_number_anywhere_in_a_model_is_refused_by_name(
    name, method, given, pico_llama, make_work
):
    model, before = pico_llama(), pico_llama().module.state_dict()
    model.module.get_parameter(name).data.view(-1)[3] = float("nan")
    work = make_work(pico_llama())
    with pytest.raises(CompressError, match=f"'{name}' has NaN or infinite values"):
        method.run(model, method.Options(**given), work)
    after = model.module.state_dict()
    assert all(torch.equal(after[key], w) for key, w in before.items() if key != name)


def test_layers_that_a_pattern_does_not_divide_are_refused_or_left(pico_llama, make_work):
    model = pico_llama(intermediate_size=42)
    with pytest.raises(CompressError, match="does not divide the 42 inputs"):
        magnitude.run(model, made(magnitude, pattern="2:4"), make_work())
    magnitude.run(model, made(magnitude, pattern="2:4", undivided="dense"), make_work())
    dense = [name for name in prunable(model) if name not in model.formats]
    assert len(dense) == 3 and all(name.endswith("down_proj") for name in dense)


def work_of(model, make_work, seed=0, **more):
    """A workbench with two batches of what the model reads."""
    batches = [random_inputs(model, 3, 11, seed + i) for i in range(2)]
    return replace(make_work(**more), _batches=lambda split, n, **shape: batches)


def pruned(name, method, make_work, **given):
    model = pico(name)
    method.run(model, made(method, samples=16, **given), work_of(model, make_work))
    return model


def reads_the_encoder(layer):
    return layer.endswith(("EncDecAttention.k", "EncDecAttention.v")) or (
        "encoder_attn." in layer and layer.endswith(("k_proj", "v_proj"))
    )


def inputs_of_the_last_block(model):
    """{Linear of the last block: what it reads at real tokens, float64 [T, I]}."""
    last = set(model.blocks(model.family.stacks[-1])[-1].modules())
    found = {name: [] for name, m in prunable(model).items() if m in last}
    own = model.family.stacks[-1].mask
    batches = [random_inputs(model, 3, 11, i) for i in range(2)]
    for batch in batches:
        hooks = []
        for name in found:
            mask = batch.get("attention_mask" if reads_the_encoder(name) else own)

            def keep(module, args, out, name=name, mask=mask):
                x = args[0].detach().double().reshape(-1, args[0].shape[-1])
                found[name].append(x if mask is None else x[mask.flatten().bool()])

            hooks.append(prunable(model)[name].register_forward_hook(keep))
        outputs(model, batch)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_pruned_by_what_its_pruned_blocks_give(name, pattern, make_work):
    """The last block of the model against formulas on the inputs it has after all others."""
    by_wanda = pruned(name, wanda, make_work, pattern=pattern)
    by_solver = pruned(name, sparsegpt, make_work, pattern=pattern)
    for model, method in ((by_wanda, wanda), (by_solver, sparsegpt)):
        assert not broken_promise(model, model.formats)
        assert model.formats.keys() == model.notes["sparsity"].keys() == prunable(model).keys()
        assert all(form.sparsity == 0.5 for form in model.formats.values())
        mixed, dense = pico(name), prunable(pico(name))
        mixed.module.load_state_dict(model.module.state_dict())
        inputs = inputs_of_the_last_block(pico_with(mixed, dense))
        for layer, x in inputs.items():
            w, new = dense[layer].weight.detach(), prunable(model)[layer].weight.detach()
            note = model.notes["sparsity"][layer]
            if method is wanda:
                score = w.double().abs() * x.norm(dim=0)
                rows = score.reshape(-1, 4) if pattern == "2:4" else score
                least = rows.sort(1).values[:, rows.shape[1] // 2 - 1 :][:, :1]
                assert torch.equal(new != 0, (rows > least).view_as(new))
                assert torch.equal(new[new != 0], w[new != 0])
            else:
                h = 2 * x.T @ x / len(x)
                pick = in_groups(2, 4) if pattern == "2:4" else in_blocks(0.5)
                again = solve(w, factorize(h.float()), pick)
                lost = output_energy(w.double() - new, h) / output_energy(w.double(), h)
                assert note["error"] == pytest.approx(lost, rel=1e-3)
                least = output_energy(w.double() - again, h) / output_energy(w.double(), h)
                assert lost == pytest.approx(least, rel=0.02)


def pico_with(model, dense):
    """The model with the dense weights in its last block."""
    last = set(model.blocks(model.family.stacks[-1])[-1].modules())
    for name, linear in prunable(model).items():
        if linear in last:
            linear.weight.data.copy_(dense[name].weight)
    return model


@pytest.mark.parametrize("method", [wanda, sparsegpt])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_padding_does_not_count(name, method, make_work):
    found = []
    for filler in (1, 4):
        model = pico(name)
        work = work_of(model, make_work)
        for batch in work.batches("calibration", 2):
            for ids, mask in (
                ("input_ids", "attention_mask"),
                ("decoder_input_ids", "decoder_attention_mask"),
            ):
                if ids in batch:
                    batch[ids][batch[mask] == 0] = filler
        method.run(model, made(method, samples=16, sparsity=0.6), work)
        found.append(model.module.state_dict())
    assert all(torch.allclose(x, found[1][key], atol=1e-4) for key, x in found[0].items())


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_shared_moments_equal_separate_ones(name):
    model = pico(name)
    linears, batch = prunable(model), random_inputs(model)
    together = Moments(linears, mask_keys(model), True)
    with together.watching(batch):
        run_backbone(model, batch)
    shared = together.shared
    assert len(shared) < len(linears) and sum(map(len, shared.values())) == len(linears)
    for leader, names in shared.items():
        h = together.pop(leader)
        assert torch.equal(h, h.T)
        for layer in names:
            alone = Moments({layer: linears[layer]}, mask_keys(model), True)
            with alone.watching(batch):
                run_backbone(model, batch)
            assert torch.equal(alone.pop(layer), h)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_nothing_is_computed_behind_the_last_input_that_counts(name):
    """Of every batch but the first, which tells how many inputs there are."""
    model = pico(name)
    linears, batches = prunable(model), [random_inputs(model, rows=2, seed=i) for i in range(3)]
    calls = dict.fromkeys(linears, 0)

    def count(layer):
        def add(*_):
            calls[layer] += 1

        return add

    for layer, linear in linears.items():
        linear.register_forward_hook(count(layer))
    moments = Moments(linears, mask_keys(model), whole=True)
    for batch in batches:
        with moments.watching(batch):
            run_backbone(model, batch)
    assert sorted(calls.values()) == [1, *[3] * (len(linears) - 1)]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert moments.tokens[next(iter(moments.shared))] == tokens


def test_moments_in_panels_are_those_of_one_product():
    linear = torch.nn.Linear(1100, 1)
    x = torch.randn(2, 30, 1100, generator=torch.Generator().manual_seed(0))
    for whole in (True, False):
        moments = Moments({"a": linear}, {"a": "attention_mask"}, whole)
        for mask in (None, torch.ones(2, 30), torch.arange(30).expand(2, -1) < 20):
            with moments.watching({} if mask is None else {"attention_mask": mask}):
                linear(x)
        rows = torch.cat([x, x, x[:, :20]], 1).reshape(-1, 1100).double()
        wanted = 2 * rows.T @ rows / len(rows)
        assert torch.allclose(
            moments.pop("a").double(), wanted if whole else wanted.diagonal(), atol=1e-5
        )


def test_less_is_lost_than_with_data_alone_and_far_less_than_without(pico_llama, make_work):
    lost = {}
    for method in (sparsegpt, wanda, magnitude):
        model, dense = pico_llama(), pico_llama()
        extra = {} if method is magnitude else {"samples": 64}
        method.run(model, made(method, sparsity=0.5, **extra), make_work())
        batch = random_inputs(dense, 8, 16)
        gap = outputs(model, batch)["logits"] - outputs(dense, batch)["logits"]
        lost[method] = float(gap.square().mean())
    assert lost[sparsegpt] < lost[wanda] < lost[magnitude]


def test_zeros_of_an_earlier_stage_stay_zeros(pico_llama, make_work):
    for first, second in (("2:4", "unstructured"), ("unstructured", "2:4")):
        for method in (wanda, sparsegpt, magnitude):
            model = pico_llama()
            extra = {} if method is magnitude else {"samples": 16}
            magnitude.run(model, made(magnitude, pattern=first), make_work())
            before = dict(model.formats)
            share = {"sparsity": 0.7} if second == "unstructured" else {}
            method.run(model, made(method, pattern=second, **share, **extra), make_work())
            assert not broken_promise(model, before | model.formats)
            assert not broken_promise(model, before)
            if first == "2:4":
                assert {form.pattern for form in model.formats.values()} == {"2:4"}
                assert min(form.sparsity for form in model.formats.values()) > 0.68


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_zeros_have_no_sign(pattern, pico_llama, make_work):
    for method in (wanda, sparsegpt, magnitude):
        model = pico_llama()
        extra = {} if method is magnitude else {"samples": 16}
        method.run(model, made(method, pattern=pattern, **extra), make_work())
        for linear in prunable(model).values():
            gone = linear.weight == 0
            assert gone.any() and not linear.weight[gone].signbit().any()


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [("4:8", "2:4", "2:4"), ("2:4", "4:8", "2:4"), ("2:4", "1:8", "1:8"), ("3:8", "1:4", "1:4")],
)
def test_of_two_patterns_the_stricter_one_is_promised_and_holds(
    first, second, kept, pico_llama, make_work
):
    for method in (wanda, sparsegpt, magnitude):
        model = pico_llama()
        extra = {} if method is magnitude else {"samples": 16}
        magnitude.run(model, made(magnitude, pattern=first), make_work())
        before = dict(model.formats)
        method.run(model, made(method, pattern=second, **extra), make_work())
        assert {form.pattern for form in model.formats.values()} == {kept}
        assert not broken_promise(model, model.formats) and not broken_promise(model, before)


def test_patterns_that_do_not_go_together_are_refused_and_nothing_is_changed(pico_llama, make_work):
    model = pico_llama()
    magnitude.run(model, made(magnitude, pattern="2:4"), make_work())
    weights = {name: m.weight.detach().clone() for name, m in prunable(model).items()}
    with pytest.raises(CompressError, match=r"'.*q_proj' has the pattern 2:4 already") as caught:
        magnitude.run(model, made(magnitude, pattern="3:8"), make_work())
    assert caught.value.hint.startswith("pattern: 2:4 or unstructured, ")
    assert all(torch.equal(m.weight, weights[name]) for name, m in prunable(model).items())


def test_a_layer_that_needs_more_damping_is_named_and_the_run_goes_on(
    pico_llama, make_work, monkeypatch
):
    lines = []
    pop = Moments.pop
    monkeypatch.setattr(Moments, "pop", lambda self, name: spoilt(pop(self, name), name))

    def spoilt(h, name):
        return h - 0.2 * h.diagonal().mean() * torch.eye(len(h)) if "layers.1.mlp" in name else h

    model = pico_llama()
    sparsegpt.run(model, made(sparsegpt, samples=16), make_work(log=lines))
    damping = model.notes["damping"]
    assert {name.split(".")[-1] for name in damping} == {"gate_proj", "up_proj", "down_proj"}
    assert all("layers.1." in name and value > 0.01 for name, value in damping.items())
    assert len(lines) == 2 and "layers.1.mlp.gate_proj" in lines[0]
    assert not broken_promise(model, model.formats)


def test_refusals_name_what_is_wrong(pico_llama, pico_bert, make_work):
    with pytest.raises(CompressError, match="length is 65 and the model takes at most 64"):
        wanda.run(pico_bert(), made(wanda, length=65), make_work())
    model = pico_llama()
    model.module.model.layers[1].post_attention_layernorm.weight.data[0] = 1e30
    with pytest.raises(CompressError, match=r"inputs of '.*layers.1.mlp.gate_proj' have NaN"):
        sparsegpt.run(model, made(sparsegpt, samples=16), make_work())
    model = pico_llama(intermediate_size=42)
    with pytest.raises(CompressError, match="does not divide the 42 inputs"):
        sparsegpt.run(model, made(sparsegpt, pattern="2:4"), make_work())
    sparsegpt.run(model, made(sparsegpt, pattern="2:4", undivided="dense"), make_work())
    assert not any(name.endswith("down_proj") for name in model.formats)


@pytest.mark.parametrize("method", [magnitude, wanda, sparsegpt])
def test_sensitive_layers_lose_fewer_weights_and_less_is_lost_in_all(method, make_work):
    data = {} if method is magnitude else {"samples": 16}
    sums = {}
    for allocation in ("uniform", "sensitivity"):
        model, dense = pico("llama", num_hidden_layers=1), pico("llama", num_hidden_layers=1)
        for own in (model, dense):  # few weights of the first layer are large
            next(iter(prunable(own).values())).weight.data.pow_(3)
        work = work_of(model, make_work)
        given = made(method, sparsity=0.6, allocation=allocation, **data)
        method.run(model, given, work)
        after = prunable(model)
        dense.module.requires_grad_(False)
        model.module.requires_grad_(False)
        zeros = sum(int((m.weight == 0).sum()) for m in after.values())
        total = sum(m.weight.numel() for m in after.values())
        step = 1 / 32 if method is wanda else 0.002  # a row of Wanda's loses whole weights
        assert 0.6 - step < zeros / total <= 0.6
        assert all(0.37 < form.sparsity < 0.81 for form in model.formats.values())
        if method is magnitude:
            errors = [
                float((m.weight - after[n].weight).square().sum() / m.weight.square().sum())
                for n, m in prunable(dense).items()
            ]
        else:
            errors = [
                next(note[k] for k in note if k.endswith("error"))
                for note in model.notes["sparsity"].values()
            ]
        sums[allocation] = sum(errors)
    assert model.formats[next(iter(after))].sparsity > 0.7
    assert sums["sensitivity"] < sums["uniform"]


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_a_curve_is_the_share_of_the_cheapest_costs_and_takes_little_memory(scope):
    w, h, shares = torch.randn(1536, 1024), torch.rand(1024), torch.tensor([0.0, 0.25, 0.5, 0.75])
    reset_peak_memory()
    before = peak_memory()
    found = curve(w, h, shares, scope)
    assert peak_memory() - before < 16 * w.numel()  # what preflight allows for a layer
    costs = (w.double().square() * h).view(1536 if scope == "row" else 1, -1).sort().values
    for share, error in zip(shares.tolist(), found.tolist(), strict=True):
        gone = costs[:, : int(share * costs.shape[1])].sum()
        assert error == pytest.approx(float(gone / costs.sum()), rel=1e-5)
    assert found.dtype == torch.float64


def test_shares_have_the_least_summed_error_of_all(pico_llama):
    """Against every combination of shares on a grid that meets the target."""
    shares = torch.linspace(0.3, 0.7, 9)
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 20, generator=draw) ** power for power in (1, 3, 1)]
    h = [torch.rand(20, generator=draw) ** power for power in (1, 1, 4)]
    curves = {str(i): curve(w, h[i], shares, "matrix") for i, w in enumerate(weights)}
    found = least_error(curves, dict.fromkeys(curves, 160), shares, 0.5)
    assert sum(found.values()) == pytest.approx(1.5)
    error = lambda name, share: curves[name][int((shares - share).abs().argmin())]  # noqa: E731
    ours = sum(float(error(name, share)) for name, share in found.items())
    every = [
        sum(float(curves[str(n)][k]) for n, k in enumerate(places))
        for places in itertools.product(range(9), repeat=3)
        if sum(places) == 12
    ]
    assert ours == pytest.approx(min(every), rel=1e-6)


@pytest.mark.parametrize("method", [magnitude, wanda, sparsegpt])
def test_ratios_except_layers(method, pico_llama, make_work):
    data = {} if method is magnitude else {"samples": 8}
    model, dense = pico_llama(), pico_llama()
    ratios = {"*.down_proj": 0.25, "*.layers.1.*": 0, "*.layers.1.self_attn.?_proj": 0.75}
    method.run(model, made(method, sparsity=0.5, ratios=ratios, **data), make_work())
    assert model.formats["model.layers.0.mlp.down_proj"].sparsity == 0.25
    assert model.formats["model.layers.0.mlp.up_proj"].sparsity == 0.5
    assert model.formats["model.layers.1.self_attn.q_proj"].sparsity == 0.75
    name = "model.layers.1.mlp.down_proj"
    assert name not in model.formats
    assert torch.equal(prunable(model)[name].weight, prunable(dense)[name].weight)
    with pytest.raises(CompressError, match=r"'model.layer.0.mlp.up_proj' fits no layer; did you"):
        method.run(model, made(method, ratios={"model.layer.0.mlp.up_proj": 0.5}), make_work())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"pattern": "2:4", "allocation": "sensitivity"}, "no allocation: sensitivity"),
        ({"pattern": "2:4", "ratios": {"*": 0.5}}, "no ratios"),
        ({"ratios": {"*": 1.0}}, "less than 1"),
        ({"sparsity": 0.96, "allocation": "sensitivity"}, "below 0.95"),
    ],
)
def test_allocations_that_cannot_be_are_refused(given, sentence):
    with pytest.raises(ValidationError, match=sentence):
        made(wanda, **given)
