"""Differentiable quantization on pico models: points learn, weights stay, zeros stay zero."""

import math
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from compressor.errors import CompressError
from compressor.model import layers
from compressor.model.forward import outputs
from compressor.model.sparse import broken_promise, prunable
from compressor.model.stored import quantized_state
from compressor.numerics.buckets import scaled
from compressor.quantize import differentiable
from compressor.quantize.points import shared_points, start_points
from compressor.training.options import Train
from families import pico, sparse
from interrupted import Stopped, stopping
from predicting import labelled

SHORT = {"batch": 4, "length": 16, "lr": 0.02, "warmup": 1, "precision": "float32"}
BATCH = {
    "input_ids": torch.arange(5, 25).reshape(2, 10),
    "attention_mask": torch.ones(2, 10, dtype=torch.long),
}
KINDS = {
    "group": {"group": 16},
    "flat": {"bucket": "flat", "group": 256},
    "absmax": {"group": 16, "scaling": "absmax"},
    "sgd": {"group": 16, "optimizer": "sgd", "start": "uniform"},
    "gradient": {"group": 16, "allocation": "gradient"},
    "alternate": {"group": 16, "alternate": 2},
    "held": {"bucket": "flat", "group": 100, "reassign": None},
    "sometimes": {"group": 16, "reassign": 3},
}


def options(steps=4, train=None, **changes):
    changes = {"bits": 3, **changes}
    given = Train(**SHORT | {"steps": steps} | (train or {}))
    return differentiable.Options(train=given, **changes)


@pytest.mark.parametrize(("kind", "tied"), [*((kind, True) for kind in KINDS), ("gradient", False)])
def test_every_weight_has_the_nearest_point_and_it_reloads_exactly(
    kind, tied, pico_llama, make_work
):
    settings = {"tie_word_embeddings": tied}
    model, before = pico_llama(**settings), pico_llama(**settings)
    work, wanted = make_work(pico_llama(**settings)), options(**KINDS[kind])
    differentiable.run(model, wanted, work)
    for name, form in model.formats.items():
        table, weight = (m.module.get_submodule(name) for m in (model, before))
        weight, points = weight.weight.detach(), table.points_P
        assert form.codebook == "learned" and len(points) == form.points
        assert form.bits == math.ceil(math.log2(form.points))
        if kind in ("held", "sometimes"):
            continue  # points moved since weights were assigned
        assert bool((points.diff() >= 0).all())
        if kind == "alternate":
            continue  # its weights moved
        cut = wanted.buckets(type("T", (), {"group": form.group})).cut(weight)
        v = scaled(cut, table.scale, table.offset).flatten()[: weight.numel()]
        distance = (v[:, None] - points).abs()
        chosen = distance.gather(1, table.codes_OI.flatten().long()[:, None])[:, 0]
        torch.testing.assert_close(chosen, distance.min(1).values, rtol=0, atol=1e-6)
    fresh = pico_llama(seed=1, **settings)
    layers.install(fresh.module, model.formats)
    state = quantized_state(model.module, torch.float32)
    layers.state_from_disk(fresh.module, {name: lazy.make() for name, lazy in state.items()})
    assert torch.equal(outputs(fresh, BATCH)["logits"], outputs(model, BATCH)["logits"])
    loss = differentiable.objective(wanted, model, work.teacher)
    with torch.no_grad():
        values = [loss(batch).item() for batch in work.batches("validation", None)]
    assert model.notes["validation"]["after"] == pytest.approx(sum(values) / len(values), rel=1e-6)
    norms = [name for name in before.module.state_dict() if "norm" in name]
    own, old = model.module.state_dict(), before.module.state_dict()
    assert all(torch.equal(own[n], old[n]) for n in norms) == (kind != "alternate")


@pytest.mark.parametrize("kind", ["flat", "absmax"])
def test_points_learn(kind, pico_llama, make_work):
    model, wanted = pico_llama(), options(40, {"lr": 0.1}, bits=2, ce=0.0, **KINDS[kind])
    differentiable.run(model, wanted, make_work(pico_llama()))
    noted = model.notes["validation"]
    assert noted["after"] < 0.8 * noted["before"]


@pytest.mark.parametrize("start", ["uniform", "quantiles"])
@pytest.mark.parametrize("scaling", ["linear", "absmax"])
def test_points_start_where_they_are_told_to(start, scaling, pico_llama, make_work):
    model, before = pico_llama(), pico_llama()
    wanted = options(1, {"lr": 1e-12}, group=16, start=start, scaling=scaling, embeddings=False)
    differentiable.run(model, wanted, make_work(pico_llama()))
    for name in model.formats:
        w = before.module.get_submodule(name).weight.detach().double().view(-1, 16).numpy()
        low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
        v = (w - low) / (high - low) if scaling == "linear" else w / np.maximum(-low, high)
        even = np.linspace(0 if scaling == "linear" else -1, 1, 8)
        points = even if start == "uniform" else np.quantile(v, np.linspace(0, 1, 8))
        own = model.module.get_submodule(name).points_P.numpy()
        np.testing.assert_allclose(own, points, rtol=0, atol=2e-3)  # scales are float16
        assert float(np.abs(even - np.quantile(v, np.linspace(0, 1, 8))).max()) > 0.02


def test_sgd_moves_points_down_the_gradient(pico_llama, make_work):
    """A first step with Nesterov's momentum: p - 1.9 lr dL/dp, by the dense model's gradient."""
    lr, models = 0.01, []
    for rate in (1e-12, lr):
        model, work = pico_llama(), make_work(pico_llama())
        given = options(1, {"lr": rate, "clip": 1e9}, group=16, optimizer="sgd")
        differentiable.run(model, given, work)
        models.append(model)
        shutil.rmtree(work.scratch)
    dense = pico_llama()
    for name in models[0].formats:  # the dense model with the values of the quantized one
        weight = dense.module.get_submodule(name).weight
        weight.data.copy_(models[0].module.get_submodule(name).weight)
    (batch,) = make_work().batches("train", 1, batch=4, length=16)
    differentiable.objective(given, dense, pico_llama())(batch).backward()
    for name in models[0].formats:
        first, last = (m.module.get_submodule(name) for m in models)
        gradient = dense.module.get_submodule(name).weight.grad.double()
        by_scale = gradient.unflatten(1, (first.scale.shape[1], -1)) * first.scale[..., None]
        slope = torch.bincount(first.codes_OI.flatten(), by_scale.flatten(), 8)
        change = (last.points_P - first.points_P).double()
        torch.testing.assert_close(change, -1.9 * lr * slope, rtol=1e-2, atol=1e-6)


def test_learning_both_is_better_than_points_alone(pico_llama, make_work):
    found = []
    for more in ({}, {"alternate": 5, "weight_lr": 3e-3}):
        model, work = pico_llama(), make_work(pico_llama())
        differentiable.run(model, options(20, bits=2, group=16, **more), work)
        found.append(model.notes["validation"]["after"])
        shutil.rmtree(work.scratch)
    assert found[1] < found[0]


def test_points_follow_the_gradient_of_the_quantized_model(pico_llama, make_work):
    model, teacher, count = pico_llama(), pico_llama(), 8
    wanted = options(1, allocation="gradient", group=16)
    work = make_work(teacher)
    differentiable.run(model, wanted, work)
    shutil.rmtree(work.scratch)
    even, found = pico_llama(), pico_llama()
    differentiable.run(even, options(1, {"lr": 1e-12}, group=16), make_work(teacher))
    for name in even.formats:  # the dense model with the values of the quantized one
        weight = found.module.get_submodule(name).weight
        weight.data.copy_(even.module.get_submodule(name).weight)
    loss = differentiable.objective(wanted, found, teacher)
    weights = [found.module.get_submodule(n).weight for n in model.notes["points"]]
    gradients = [
        torch.autograd.grad(loss(batch), weights, allow_unused=True)
        for batch in work.batches("train", 5, batch=4, length=16)
    ]
    norms = [sum(float(g.norm()) for g in of) / 5 for of in zip(*gradients, strict=True)]
    assert list(model.notes["points"].values()) == shared_points(norms, count)
    assert sum(model.notes["points"].values()) == count * len(norms)
    assert len(set(model.notes["points"].values())) > 1


def test_weights_that_are_never_reassigned_keep_their_points(pico_llama, make_work):
    models = []
    for lr in (1e-12, 0.1):
        model, work = pico_llama(), make_work(pico_llama())
        wanted = options(6, {"lr": lr}, bucket="flat", group=100, reassign=None)
        differentiable.run(model, wanted, work)
        models.append(model)
        shutil.rmtree(work.scratch)
    for name in models[0].formats:
        first, last = (model.module.get_submodule(name) for model in models)
        assert torch.equal(first.codes_OI, last.codes_OI)
        assert not torch.allclose(first.points_P, last.points_P, atol=1e-3)


@pytest.mark.parametrize("kind", ["sgd", "gradient", "alternate", "sometimes"])
def test_a_killed_run_goes_on_with_the_same_bits(kind, pico_llama, make_work):
    wanted = options(7, {"snapshot_seconds": 0}, **KINDS[kind])
    results, log = [], []
    for stop in (None, 5):
        model = pico_llama(tie_word_embeddings=True)
        work = make_work(pico_llama(tie_word_embeddings=True), log=log)
        if stop is not None:
            with pytest.raises(Stopped):
                differentiable.run(model, wanted, stopping(work, stop))
            model = pico_llama(tie_word_embeddings=True)
        differentiable.run(model, wanted, work)
        results.append(model)
        shutil.rmtree(work.scratch)
    assert "resuming after step 5" in log
    first, second = (m.module.state_dict() for m in results)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("alternate", [None, 2])
def test_zeros_of_an_earlier_stage_stay_zeros(alternate, pico_llama, make_work):
    model = sparse(pico_llama())
    gone = {name: linear.weight == 0 for name, linear in prunable(model).items()}
    before = dict(model.formats)
    with pytest.raises(CompressError, match="linear scaling has no point at 0"):
        differentiable.run(model, options(group=16), make_work(pico_llama()))
    wanted = options(9, scaling="absmax", group=16, alternate=alternate)
    differentiable.run(model, wanted, make_work(pico_llama()))
    assert not broken_promise(model, before) and not broken_promise(model, model.formats)
    for name, zeros in gone.items():
        table = model.module.get_submodule(name)
        assert not table.weight[zeros].any() and 0.0 in table.points_P.tolist()


@pytest.mark.parametrize("family", ["gpt2", "t5", "whisper", "bert", "vit"])
def test_every_kind_of_model(family, make_work):
    model, work = pico(family), make_work(pico(family))
    batch = labelled(model)
    object.__setattr__(work, "_batches", lambda split, n, **_: [batch] * (1 if n is None else n))
    differentiable.run(model, options(2, group=16, allocation="gradient"), work)
    assert set(prunable(pico(family))) <= set(model.formats)
    for name, count in model.notes["points"].items():
        table = model.module.get_submodule(name)
        weight = pico(family).module.get_submodule(name).weight.detach()
        scale, offset = table.scale, table.offset
        v = scaled(weight.unflatten(1, (scale.shape[1], -1)), scale, offset)
        start = start_points(v, count, "quantiles", False, False)
        assert len(table.points_P) == count and not torch.equal(table.points_P, start)
        assert float((table.points_P - start).abs().max()) < 0.1


def test_the_rate_of_points_is_the_default_whatever_else_is_said_of_training():
    wanted = differentiable.Options(train={"steps": 3})  # as a profile gives it
    assert (wanted.train.steps, wanted.train.lr) == (3, differentiable.Options().train.lr)
    assert wanted.train.lr != Train().lr
    assert differentiable.Options(train={"lr": 0.01}).train.lr == 0.01


def test_a_gradient_that_is_not_finite_is_refused(pico_llama, make_work):
    model = pico_llama()
    model.module.model.norm.weight.data.fill_(1e38)  # a number, whose gradient is none
    wanted = options(1, group=16, allocation="gradient")
    with pytest.raises(CompressError, match="is NaN or infinite"):
        differentiable.run(model, wanted, make_work(pico_llama()))


def test_options_that_contradict_each_other():
    with pytest.raises(ValidationError, match="said by scaling"):
        options(symmetric=False)
    with pytest.raises(ValidationError, match="needs optimizer: adam"):
        options(alternate=2, optimizer="sgd")
    with pytest.raises(ValidationError, match=r"betas is for optimizer: adam"):
        options(optimizer="sgd", train={"betas": (0.5, 0.9)})
    with pytest.raises(ValidationError, match="weight_lr is for alternate"):
        options(weight_lr=1e-3)
    with pytest.raises(ValidationError, match="freeze_embeddings is for alternate"):
        options(freeze_embeddings=True)
    with pytest.raises(ValidationError, match="needs reassign: 1"):
        options(alternate=2, reassign=None)
