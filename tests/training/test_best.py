"""The best weights of a training are kept, an early end is one, and both survive a kill."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from pydantic import ValidationError

from compressor.distill import ce, runner
from compressor.errors import CompressError
from compressor.training.loop import Train, train

SHORT = {"batch": 4, "length": 16, "lr": 3e-3, "warmup": 2, "precision": "float32"}


class Stop(Exception):
    pass


def fit(model, work, values, stop=None, without=None, **changes):
    """Train; `values` are what looks find. Returns facts and the weights after every step.

    Args:
        stop: the step that a kill ends.
        without: the first step without a snapshot.
    """
    settings = Train(**SHORT | {"steps": 12, "validate_every": 2, "snapshot_seconds": 0} | changes)
    looked, seen, after = [], iter(values), {}

    def after_step(step):
        after[step] = {k: v.clone() for k, v in model.module.state_dict().items()}
        if step == stop:
            raise Stop
        if step == without:
            object.__setattr__(settings, "snapshot_seconds", 1e6)  # this step has none

    def look():
        looked.append(next(seen))
        return looked[-1]

    given = (ce.objective(ce.Options(train=settings), model, None), settings, work)
    facts = train(
        model, work.batches("train", settings.steps), *given, after_step=after_step, look=look
    )
    return facts, after, len(looked)


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "values, wanted",
    [
        ([5, 3, 4, 3, 4, 4], 4),  # the first of equals
        ([5, 4, 3, 2, 1, 0.5], 12),
        ([math.nan, 3, math.inf, 4, math.nan, 3.5], 4),
    ],
)
def test_the_weights_of_the_best_look_are_what_stays(pico_llama, make_work, values, wanted):
    model = pico_llama()
    facts, after, looks = fit(model, make_work(), values)
    assert facts["steps"] == 12 and facts["best_step"] == wanted and looks == 6
    assert same(after[wanted], model.module.state_dict())
    assert wanted == 12 or not same(after[12], model.module.state_dict())


def test_without_a_finite_look_the_last_weights_stay(pico_llama, make_work):
    model = pico_llama()
    facts, after, _ = fit(model, make_work(), [math.nan] * 6)
    assert "best_step" not in facts and same(after[12], model.module.state_dict())


def test_patience_ends_the_training(pico_llama, make_work):
    model = pico_llama()
    facts, after, looks = fit(model, make_work(), [5, 3, 4, 4, 2, 1], patience=2)
    assert facts["steps"] == 8 and facts["best_step"] == 4 and looks == 4
    assert same(after[4], model.module.state_dict())


def test_the_last_step_is_always_looked_at(pico_llama, make_work):
    facts, _, looks = fit(pico_llama(), make_work(), [5, 4, 3], validate_every=5)
    assert facts["best_step"] == 12 and looks == 3


@pytest.mark.parametrize("stop", [4, 6, 9])  # on the best step, on a worse look, between looks
@pytest.mark.parametrize("patience", [0, 3])
def test_a_resumed_run_keeps_the_same_weights(pico_llama, make_work, stop, patience):
    values = [5, 3, 4, 3.5, 4, 6]
    whole = pico_llama()
    wanted, _, _ = fit(whole, make_work(), values, patience=patience)
    shutil.rmtree(make_work().scratch)
    with pytest.raises(Stop):
        fit(pico_llama(), make_work(), values, stop, patience=patience)
    model = pico_llama()
    left = values[(stop - 1) // 2 :]  # the snapshot is of the step before
    got, _, _ = fit(model, make_work(), left, patience=patience)
    assert got["best_step"] == wanted["best_step"] == 4 and got["steps"] == wanted["steps"]
    assert same(whole.module.state_dict(), model.module.state_dict())
    again = pico_llama()  # killed after the last step: nothing is trained or looked at
    assert fit(again, make_work(), [], patience=patience)[0] == got
    assert same(whole.module.state_dict(), again.module.state_dict())


def test_a_look_that_comes_out_otherwise_than_before_the_kill(pico_llama, make_work):
    """The killed run had found better weights than its last snapshot knew; this one does not."""
    whole = pico_llama()
    fit(whole, make_work(), [5, 4, 4.5, 4.2, 4.3, 4.4])
    shutil.rmtree(make_work().scratch)
    with pytest.raises(Stop):  # snapshots: after every step until the fourth
        fit(pico_llama(), make_work(), [5, 4, 3], 8, without=5)
    assert {p.name for p in make_work().scratch.glob("best-*")} == {
        f"best-{step:09d}.safetensors" for step in (4, 6)
    }
    model = pico_llama()
    got, _, _ = fit(model, make_work(), [4.5, 4.2, 4.3, 4.4])
    assert got["best_step"] == 4 and same(whole.module.state_dict(), model.module.state_dict())


def test_weights_of_another_run_are_forgotten(pico_llama, make_work):
    fit(pico_llama(), make_work(), [1, 2, 2, 2, 2, 2])
    work = make_work()
    with pytest.raises(Stop):
        fit(pico_llama(), work, [], 1, lr=1e-3)
    assert not list(work.scratch.glob("best*"))


def test_a_method_looks_at_validation_rows_and_notes_what_it_found(pico_llama, make_work):
    """Far too fast a rate: the loss rises after the first steps, and the best is noted."""
    model, work = pico_llama(), make_work()
    settings = Train(**SHORT | {"lr": 0.5, "steps": 12, "validate_every": 1, "warmup": 0})
    options = ce.Options(train=settings)
    facts = runner.run(model, ce.objective(options, model, None), options, work)
    losses = dict(model.notes["validation_loss"])
    assert len(losses) == 12 and facts["best_step"] == min(losses, key=losses.get)
    assert model.notes["validation"]["after"] == pytest.approx(min(losses.values()), rel=1e-6)
    lines = [json.loads(x) for x in (work.scratch / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "validation" in x] == list(range(1, 13))


def test_without_validation_rows_it_refuses_before_the_first_step(pico_llama, make_work):
    work = make_work()
    rows = dataclasses.replace(
        work, _batches=lambda s, n, **k: work.batches(s, n, **k) if s == "train" else []
    )
    model, options = pico_llama(), ce.Options(train=Train(**SHORT, steps=2, validate_every=1))
    with pytest.raises(CompressError, match="validation rows"):
        runner.run(model, ce.objective(options, model, None), options, rows)


def test_patience_without_looks_is_refused():
    with pytest.raises(ValidationError, match="validate_every"):
        Train(patience=3)
