"""The loop: it learns, goes on after an interruption with the same bits, and stops at NaN."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from compressor.distill import ce
from compressor.errors import CompressError
from compressor.training import snapshot
from compressor.training.loop import Train, train
from compressor.training.options import lr_factor
from compressor.training.precision import choose_precision
from compressor.training.snapshot import State, read_snapshot, remove_snapshots, write_snapshot

SHORT = {"batch": 4, "length": 16, "lr": 3e-3, "warmup": 2, "precision": "float32"}


class Stop(Exception):
    pass


def fit(model, work, after_step=None, **changes):
    settings = Train(**SHORT | {"steps": 12} | changes)
    batches = work.batches("train", settings.steps * settings.accumulate)
    objective = ce.objective(ce.Options(train=settings), model, None)
    facts = train(model, batches, objective, settings, work, after_step=after_step)
    return facts, {k: v.clone() for k, v in model.module.state_dict().items()}


def lines(work):
    text = (work.scratch / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_loss_falls(pico_llama, make_work):
    work = make_work()
    one = work.batches("train", 1)
    work = dataclasses.replace(work, _batches=lambda split, n, **_: one * n)
    facts, _ = fit(pico_llama(), work, steps=40)
    found = lines(work)
    assert [line["step"] for line in found] == [1, 10, 20, 30, 40]
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert facts["steps"] == 40 and facts["precision"] == "float32"
    assert facts["tokens"] == 40 * int(one[0]["attention_mask"].sum())


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_resumed_run_gives_the_same_bits(pico_llama, make_work, stop):
    straight, wanted = fit(pico_llama(), make_work(), accumulate=2)
    shutil.rmtree(make_work().scratch)
    work, log = make_work(), []

    def interrupt(step):
        if step == stop + 1:
            raise Stop

    with pytest.raises(Stop):
        fit(pico_llama(), work, interrupt, accumulate=2, snapshot_seconds=0)
    torch.manual_seed(99)
    model = pico_llama()
    torch.manual_seed(99)
    resumed, got = fit(model, make_work(log=log), accumulate=2, snapshot_seconds=0)
    assert f"resuming after step {stop}" in log
    assert same(wanted, got)
    assert resumed["tokens"] == straight["tokens"] and resumed["loss"] == straight["loss"]
    assert [line["step"] for line in lines(work)] == [1, 10, 12]


class WithState(torch.nn.Module):
    """An objective with a parameter, a buffer and randomness of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = [model]
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))
        self.parts = {}

    def forward(self, batch):
        states = self.model[0](batch["input_ids"], use_cache=False).logits
        self.seen += 1
        noise = torch.rand_like(states)
        loss = (self.scale * states - noise * self.seen).square().mean()
        self.parts = {"seen": self.seen}
        return loss


def test_objective_and_random_state_are_resumed(pico_llama, make_work):
    def go(work, after_step=None):
        module, settings = pico_llama().module, Train(**SHORT, steps=8, snapshot_seconds=0)
        objective = WithState(module)
        torch.manual_seed(5)
        batches = work.batches("train", 8)
        train(module, batches, objective, settings, work, after_step=after_step)
        return module.state_dict() | {"own": objective.scale, "seen": objective.seen}

    wanted = go(make_work())
    shutil.rmtree(make_work().scratch)

    def interrupt(step):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        go(make_work(), interrupt)
    got = go(make_work())
    assert same(wanted, got) and got["seen"] == 8
    assert lines(make_work())[-1]["seen"] == 8


def test_a_snapshot_of_another_run_is_not_used(pico_llama, make_work):
    fit(pico_llama(), make_work())
    log = []
    fit(pico_llama(), make_work(log=log), lr=1e-3)
    assert log == ["the snapshot in scratch is of another run: starting anew"]


def test_a_half_written_snapshot_is_ignored(tmp_path):
    """Kill a process while it flushes its second snapshot; the first one is still there."""
    script = f"""
import os, signal, torch
from pathlib import Path
from compressor.training import snapshot
def state(step):
    return snapshot.State(step, {{"w": torch.full((4,), float(step))}},
        {{"state": {{}}, "param_groups": []}}, {{}})
folder = Path({str(tmp_path)!r})
snapshot.write_snapshot(folder, state(1))
snapshot.flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)
snapshot.write_snapshot(folder, state(2))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "snapshot.partial").is_dir()
    found = read_snapshot(tmp_path)
    assert found is not None and found.step == 1 and found.weights["w"].tolist() == [1.0] * 4
    write_snapshot(tmp_path, dataclasses.replace(found, step=3))
    assert [p.name for p in tmp_path.iterdir()] == ["snapshot-000000003"]


def test_a_half_removed_snapshot_does_not_count(tmp_path, monkeypatch):
    def stop(path, **_):
        if path.exists():
            (path / "state.json").unlink()
            raise KeyboardInterrupt

    write_snapshot(tmp_path, State(1, {"w": torch.ones(2)}, {"state": {}, "param_groups": []}, {}))
    with monkeypatch.context() as patch:
        patch.setattr(snapshot.shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            remove_snapshots(tmp_path)
    assert read_snapshot(tmp_path) is None
    remove_snapshots(tmp_path)


def test_an_optimizer_comes_back_as_it_was(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    write_snapshot(tmp_path, State(1, {"w": weight}, optimizer.state_dict(), {"a": 0.1 + 0.2}))
    found = read_snapshot(tmp_path)
    assert found is not None and found.facts == {"a": 0.1 + 0.2}
    again = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    again.load_state_dict(found.optimizer)
    mine, theirs = optimizer.state[weight], again.state[weight]
    assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])


def test_nan_names_the_step_and_keeps_the_snapshot(pico_llama, make_work):
    model, work = pico_llama(), make_work()

    def poison(step):
        if step == 4:
            model.module.lm_head.weight.data[0, 0] = float("nan")

    with pytest.raises(CompressError, match="the loss is nan at step 5") as caught:
        fit(model, work, poison, snapshot_seconds=1000)
    assert "if any, are kept" in caught.value.what  # there is none yet
    assert "lower train.lr" in caught.value.hint
    assert read_snapshot(work.scratch) is None
    model = pico_llama()
    with pytest.raises(CompressError, match="step 5"):
        fit(model, work, poison, snapshot_seconds=0)
    found = read_snapshot(work.scratch)
    assert found is not None and found.step == 4


def test_only_what_requires_gradients_moves(pico_llama, make_work):
    model = pico_llama()
    model.module.requires_grad_(False)
    model.module.lm_head.requires_grad_(True)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    _, after = fit(model, make_work(), steps=2)
    assert [k for k in before if not torch.equal(before[k], after[k])] == ["lm_head.weight"]


def test_an_optimizer_of_one_s_own_keeps_the_schedule(pico_llama, make_work):
    model, work, seen = pico_llama(), make_work(), []
    settings = Train(**SHORT, steps=5, schedule="linear", final=0.0)
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
    objective = ce.objective(ce.Options(train=settings), model, None)
    train(
        model,
        work.batches("train", 5),
        objective,
        settings,
        work,
        optimizer,
        after_step=lambda step: seen.append(optimizer.param_groups[0]["lr"]),
    )
    assert seen == pytest.approx([0.1 * lr_factor(settings, i) for i in range(5)])
    assert seen[0] == pytest.approx(0.1 / 3) and seen[2] == pytest.approx(0.1)
    assert seen[-1] == pytest.approx(0.0)


def test_choosing_a_precision_leaves_no_trace(pico_llama, make_work):
    model, work = pico_llama(), make_work()
    objective = WithState(model.module)
    weights = [*model.module.parameters(), objective.scale]
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    random, settings = torch.get_rng_state(), Train(**SHORT | {"precision": "auto"})
    batch = work.batches("train", 1)[0]
    chosen = choose_precision(objective, batch, weights, settings, work)
    assert chosen in ("float32", "bfloat16")
    assert torch.equal(random, torch.get_rng_state()) and objective.seen == 0
    assert all(weight.grad is None for weight in weights)
    assert same(before, model.module.state_dict())
    other = "bfloat16" if chosen == "float32" else "float32"
    (work.scratch / "precision.json").write_text(json.dumps({"precision": other}))
    assert choose_precision(objective, batch, weights, settings, work) == other


def test_bfloat16_learns_with_float32_weights(pico_llama, make_work):
    facts, after = fit(pico_llama(), make_work(), precision="bfloat16")
    assert facts["precision"] == "bfloat16"
    assert all(value.dtype == torch.float32 for value in after.values())


@pytest.mark.parametrize("bad", [{"lr": 0}, {"steps": 0}, {"betas": (0.9, 1)}, {"stpes": 3}])
def test_options_have_bounds(bad):
    with pytest.raises((ValidationError, TypeError)):
        Train(**bad)
