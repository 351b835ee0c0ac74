"""prune.ast: the pattern holds, dense weights learn, a killed run goes on with the same bits."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy, kl_div

from compressor.errors import CompressError
from compressor.model.side import drop_sides, sides
from compressor.model.sparse import broken_promise, prunable
from compressor.numerics.masks import keep_largest
from compressor.prune import ast, magnitude
from compressor.training.options import Train
from compressor.training.straight_through import Masked, make_hard
from families import pico, random_inputs

SHORT = {"batch": 4, "length": 16, "lr": 3e-3, "warmup": 2, "precision": "float32"}


def options(steps=12, train=None, **changes):
    return ast.Options(train=Train(**SHORT | {"steps": steps} | (train or {})), **changes)


PARTS = ("loss", "logits", "ce", "flip_rate")


class Stop(Exception):
    pass


@pytest.mark.parametrize("side", [None, 8])
def test_two_of_four_hold_and_the_weights_that_stay_have_learned(pico_llama, make_work, side):
    model, teacher = pico_llama(), pico_llama()
    before = {name: m.weight.detach().clone() for name, m in prunable(model).items()}
    ast.run(model, options(every=2, side=side), make_work(teacher))
    assert set(model.formats) == set(before)
    for name, linear in prunable(model).items():
        form = model.formats[name]
        assert form.pattern == "2:4" and form.sparsity == 0.5
        assert form.side_rank == (None if side is None else linear.in_features // side)
        kept = (linear.weight != 0).unflatten(1, (-1, 4)).sum(-1)
        assert bool((kept == 2).all()), name
        assert not torch.equal(linear.weight, before[name] * (linear.weight != 0))
        assert isinstance(linear.weight, torch.nn.Parameter)
    assert len(sides(model.module)) == (0 if side is None else len(before))
    assert not broken_promise(model, model.formats)
    assert [step for step, _ in model.notes["flip_rate"]] == [10, 12]
    assert all(0 < rate < 0.5 for _, rate in model.notes["flip_rate"])


def test_what_early_stopping_keeps_has_the_masks_of_its_own_weights(
    pico_llama, make_work, monkeypatch
):
    own = []

    def harden(linear):
        dense, mask = linear.parametrizations.weight.original, linear.parametrizations.weight[0]
        own.append(torch.equal(mask.mask_OI, keep_largest(dense.abs(), "2:4", 0.5, "row")))
        make_hard(linear)

    monkeypatch.setattr(ast, "make_hard", harden)
    model, looks = pico_llama(), {"validate_every": 4, "patience": 1, "lr": 0.1}
    ast.run(model, options(40, every=10, decay=0.0, train=looks), make_work(pico_llama()))
    assert model.notes["training"]["steps"] < 40 and model.notes["training"]["best_step"] % 10
    assert all(own) and len(own) == len(prunable(model))


def test_looks_leave_no_trace_in_the_metrics(pico_llama, make_work):
    lines = []
    for looks in ({}, {"validate_every": 10}):
        work = make_work(pico_llama())
        ast.run(pico_llama(), options(10, every=5, train=looks), work)
        found = [json.loads(x) for x in (work.scratch / "metrics.jsonl").read_text().splitlines()]
        assert [x["step"] for x in found if "validation" in x] == [10] * bool(looks)
        lines.append([{k: x[k] for k in PARTS} for x in found if x["step"] == 10 and "loss" in x])
        shutil.rmtree(work.scratch)
    assert lines[0] == lines[1] and len(lines[0]) == 1


FAMILIES = ["llama", "gpt2", "bert", "t5", "whisper", "vit"]


def labelled(model, rows=3):
    """A batch that the task of a model can learn from."""
    batch = random_inputs(model, rows)
    draw = torch.Generator().manual_seed(2)
    if model.task == "image-classification":
        return batch | {"labels": torch.arange(rows) % 5}
    if model.task == "fill-mask":
        ids = batch["input_ids"]
        hidden = torch.rand(ids.shape, generator=draw) < 0.3
        return batch | {"labels": ids.where(hidden, torch.full_like(ids, -100))}
    if model.task != "causal-lm":
        return batch | {"labels": batch["decoder_input_ids"]}
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_holds_in_every_kind_of_model(make_work, family):
    model, teacher = pico(family), pico(family)
    work = make_work(teacher)
    batch = labelled(model)
    object.__setattr__(work, "_batches", lambda split, n, **_: [batch] * (n or 0))
    ast.run(model, options(3, every=2, side=8, side_projection="trainable"), work)
    assert not any("parametrizations" in name for name, _ in model.module.named_parameters())
    for name, linear in prunable(model).items():
        assert model.formats[name].pattern == "2:4"
        assert int((linear.weight != 0).unflatten(1, (-1, 4)).sum(-1).max()) <= 2
    assert model.notes["training"]["steps"] == 3


def test_the_loss_is_that_of_the_paper(pico_llama, make_work):
    """alpha KL T^2 + (1 - alpha) CE of the masked model, with full logits."""
    model, teacher = pico_llama(), pico_llama(seed=1)
    batch = make_work().batches("train", 1)[0]
    work = make_work(teacher)
    wanted = pico_llama()
    for linear in prunable(wanted).values():
        linear.weight.data *= keep_largest(linear.weight.detach().abs(), "2:4", 0.5, "row")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    real = (mask[:, 1:] & mask[:, :-1]).bool()
    with torch.no_grad():
        own, above = (
            m.module(input_ids=ids, attention_mask=mask).logits[:, :-1][real]
            for m in (wanted, teacher)
        )
    own_p, above_p = ((z / 2).log_softmax(-1) for z in (own, above))
    kl = kl_div(own_p, above_p, log_target=True, reduction="batchmean") * 4
    value = 0.6 * kl + 0.4 * cross_entropy(own, ids[:, 1:][real])
    ast.run(model, options(1, kl=0.6), work)
    found = json.loads((work.scratch / "metrics.jsonl").read_text())
    assert found["loss"] == pytest.approx(float(value), rel=1e-5)
    assert found["logits"] == pytest.approx(float(kl), rel=1e-5)


@pytest.mark.parametrize(("stop", "side"), [(3, None), (4, 8)])
def test_a_killed_run_goes_on_with_the_same_bits(pico_llama, make_work, monkeypatch, stop, side):
    wanted = options(7, train={"snapshot_seconds": 0}, every=2, decay=0.01, side=side)
    straight, stopped = pico_llama(), pico_llama()
    ast.run(straight, wanted, make_work(pico_llama()))
    shutil.rmtree(make_work().scratch)
    after_step = ast.Adaptive.after_step

    def kill(self, step):
        after_step(self, step)
        if step == stop + 1:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ast.Adaptive, "after_step", kill)
        ast.run(stopped, wanted, make_work(pico_llama()))
    resumed, log = pico_llama(), []
    ast.run(resumed, wanted, make_work(pico_llama(), log=log))
    assert f"resuming after step {stop}" in log
    first, second = (m.module.state_dict() for m in (straight, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.notes["flip_rate"] == straight.notes["flip_rate"]


def test_other_patterns(pico_llama, make_work):
    model = pico_llama()
    ast.run(model, options(2, pattern="1:8"), make_work(pico_llama()))
    for linear in prunable(model).values():
        assert int((linear.weight != 0).unflatten(1, (-1, 8)).sum(-1).max()) == 1
    model = pico_llama()
    ast.run(model, options(2, pattern="unstructured", sparsity=0.75), make_work(pico_llama()))
    for name, linear in prunable(model).items():
        rows = (linear.weight != 0).sum(dim=1)
        assert set(rows.tolist()) == {linear.in_features - int(0.75 * linear.in_features)}
        assert model.formats[name].pattern == "unstructured"


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ({"sparsity": 0.3}, {"pattern": "2:4"}, "2:4"),
        ({"pattern": "2:4"}, {"pattern": "unstructured", "sparsity": 0.7}, "2:4"),
        ({"pattern": "4:8"}, {"pattern": "2:4"}, "2:4"),
    ],
)
def test_zeros_of_an_earlier_stage_stay_zeros(first, second, kept, pico_llama, make_work):
    model = pico_llama()
    magnitude.run(model, magnitude.Options(**first), make_work())
    before = dict(model.formats)
    gone = {name: m.weight == 0 for name, m in prunable(model).items()}
    ast.run(model, options(6, every=1, train={"lr": 0.05}, **second), make_work(pico_llama(seed=1)))
    assert not broken_promise(model, before) and not broken_promise(model, model.formats)
    assert {form.pattern for form in model.formats.values()} == {kept}
    for name, linear in prunable(model).items():
        assert bool((linear.weight[gone[name]] == 0).all())
        assert model.formats[name].sparsity > before[name].sparsity + 0.02


def test_a_weight_that_is_zero_for_good_is_neither_picked_nor_moved():
    weight = torch.nn.Parameter(torch.tensor([[0.0, 3, 2, 1], [9, 0, 0, 4]]))
    held = weight.detach() == 0
    mask = Masked(weight, "3:4", 0.25, held)
    assert torch.equal(mask.mask_OI, ~held)  # a row of two weights keeps two, not three
    mask(weight).sum().backward()
    assert torch.equal(weight.grad, (~held).float())
    weight.data = torch.tensor([[8.0, 3, 2, 1], [9, 8, 8, 4]])
    assert int(mask.pick(weight)) == 0 and not mask(weight)[held].any()


def test_the_ablations(pico_llama, make_work):
    def no_teacher():
        raise AssertionError("nobody asks the teacher")

    def masks(model):
        return {name: m.weight != 0 for name, m in prunable(model).items()}

    def best(model):
        return {
            name: keep_largest(m.weight.detach().abs(), "2:4", 0.5, "row")
            for name, m in prunable(model).items()
        }

    start, fixed = best(pico_llama()), pico_llama()
    work = make_work()
    object.__setattr__(work, "_teacher", no_teacher)
    ast.run(fixed, options(every=None, kl=0), work)  # fixed mask, no teacher
    assert all(torch.equal(mask, start[name]) for name, mask in masks(fixed).items())
    assert fixed.notes["flip_rate"] == []
    moving = pico_llama()
    shutil.rmtree(work.scratch)
    ast.run(moving, options(every=2, ramp=0, kl=1), make_work(pico_llama(seed=1)))
    assert any(not torch.equal(mask, start[name]) for name, mask in masks(moving).items())
    lines = (work.scratch / "metrics.jsonl").read_text().splitlines()
    assert all("ce" not in json.loads(line) for line in lines)


def test_more_decay_flips_fewer_entries(pico_llama, make_work):
    rates = []
    for decay in (0.0, 1.0):
        model, work = pico_llama(), make_work(pico_llama(seed=1))
        ast.run(model, options(20, every=4, decay=decay, ramp=0), work)
        rates.append(sum(rate for _, rate in model.notes["flip_rate"]))
        shutil.rmtree(work.scratch)
    assert rates[1] < rates[0]


@pytest.mark.parametrize(
    ("start", "projection", "divisor"), [("mean", "fixed", 8), ("sum", "trainable", 1)]
)
def test_side_paths_start_at_what_the_mask_takes_away(start, projection, divisor):
    torch.manual_seed(0)
    weight = torch.randn(5, 24)
    keep = keep_largest(weight.abs(), "2:4", 0.5, "row")
    side = ast.side_of(weight * ~keep, 8, start, projection == "trainable")
    for o in range(5):
        for r in range(3):
            places = [i for i in range(r * 8, r * 8 + 8) if not keep[o, i]]
            wanted = sum(float(weight[o, i]) for i in places) / divisor
            assert side.out_OR[o, r].item() == pytest.approx(wanted, rel=1e-5)
    x = torch.randn(2, 3, 24)
    project = torch.tensor([[float(r * 8 <= i <= r * 8 + 7) for i in range(24)] for r in range(3)])
    torch.testing.assert_close(side(x), x @ project.T @ side.out_OR.detach().T)
    assert (side.in_RI is None) == (projection == "fixed")


def test_a_drawn_side_path_starts_silent(pico_llama, make_work):
    side = ast.side_of(torch.randn(5, 24), 8, "xavier", True)
    assert not side.out_OR.any() and side.in_RI.abs().max() <= (6 / 27) ** 0.5
    with pytest.raises(ValidationError, match="side_projection: trainable"):
        options(side=8, side_start="xavier")


@pytest.mark.parametrize("projection", ["fixed", "trainable"])
def test_side_paths_learn_and_both_losses_are_noted(pico_llama, make_work, projection):
    model, work = pico_llama(), make_work(pico_llama())
    masked = options(10, every=5, side=16, side_projection=projection)
    ast.run(model, masked, work)
    for name, side in sides(model.module).items():
        linear = pico_llama().module.get_submodule(name)
        pruned = linear.weight.detach() * ~keep_largest(linear.weight.abs(), "2:4", 0.5, "row")
        first = ast.side_of(pruned, 16, "mean", projection == "trainable")
        assert not torch.equal(side.out_OR, first.out_OR)
        if projection == "trainable":
            assert not torch.equal(side.in_RI, first.in_RI)
    held, without = (model.notes[k] for k in ("validation", "validation_without_side"))
    assert held["rows"] == without["rows"] > 0 and held["after"] < held["before"]
    loss = ast.objective(options(), model, work.teacher)
    for noted in (held, without):
        with torch.no_grad():
            values = [loss(batch).item() for batch in work.batches("validation", None)]
        assert noted["after"] == pytest.approx(sum(values) / len(values), rel=1e-6)
        drop_sides(model)  # for the second round
    assert held["parts"].keys() == without["parts"].keys() == {"logits", "ce"}


def test_refusals(pico_llama, pico_bert, make_work):
    with pytest.raises(ValidationError, match="means sparsity"):
        options(sparsity=0.7)
    work = make_work(pico_llama())
    with pytest.raises(CompressError, match=r"side: 32 does not divide the 48 inputs of '.*down_p"):
        ast.run(pico_llama(), options(side=32), work)
    with pytest.raises(CompressError, match="pattern 1:32 does not divide the 48 inputs"):
        ast.run(pico_llama(), options(pattern="1:32"), work)
    with pytest.raises(CompressError, match="predicts tokens or labels; this one is a feature"):
        ast.run(pico_bert(), options(), work)
    with pytest.raises(CompressError, match="vocabulary"):
        ast.run(pico_llama(vocab_size=64), options(), work)
    model = pico_llama()
    ast.run(model, options(1, side=32, undivided="dense"), work)
    assert not any(name.endswith("down_proj") for name in sides(model.module))
    assert len(sides(model.module)) == 6 * 3
    with pytest.raises(CompressError, match="has side paths already"):
        ast.run(model, options(side=8), work)
