"""A teacher that is corrected while it teaches: its own cross entropy, its own rate, resumed."""

import json
import shutil

import pytest
import torch

from compressor.distill import ce, kd, minitron
from compressor.errors import CompressError
from compressor.model.manifest import WeightFormat
from compressor.training.loop import train
from compressor.training.options import Train
from compressor.training.snapshot import read_snapshot
from families import pico
from predicting import labelled, scored

SHORT = {"batch": 4, "length": 16, "lr": 3e-3, "warmup": 2, "precision": "float32"}


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", [kd, minitron])
def test_student_and_teacher_get_their_own_gradients(method):
    student, teacher = pico("llama"), pico("llama", seed=1)
    batch = labelled(student)
    options = method.Options(correct_teacher={"lr": 1e-4})
    loss = method.objective(options, student, teacher)(batch)
    z_t, targets = scored(teacher, batch)
    ce = -z_t.log_softmax(-1)[range(len(z_t)), targets].mean()
    s, t = scored(student, batch)[0].log_softmax(-1), z_t.log_softmax(-1).detach()
    kl = (t.exp() * (t - s)).sum(-1).mean()
    assert loss.item() == pytest.approx(kl.item(), rel=1e-4)  # the value is the student's
    for wanted, model in ((ce, teacher), (kl, student)):
        for weight in (
            model.module.lm_head.weight,
            model.module.model.layers[0].mlp.up_proj.weight,
        ):
            torch.testing.assert_close(
                torch.autograd.grad(loss, weight, retain_graph=True)[0],
                torch.autograd.grad(wanted, weight, retain_graph=True)[0],
                rtol=1e-3,
                atol=1e-6,
            )


def fit(work, after_step=None, student=None, teacher=None, lr=1e-3, **changes):
    """Correct a teacher for some steps; (weights of both, metrics parts)."""
    settings = Train(**SHORT | {"steps": 8} | changes)
    student = student or pico("llama", num_hidden_layers=2)
    teacher = teacher or pico("llama", seed=1)
    options = minitron.Options(train=settings, correct_teacher={"lr": lr})
    objective = minitron.objective(options, student, teacher)
    batches = work.batches("train", settings.steps)
    train(student, batches, objective, settings, work, after_step=after_step)
    found = {f"student.{k}": v.clone() for k, v in student.module.state_dict().items()}
    return found | {f"teacher.{k}": v.clone() for k, v in teacher.module.state_dict().items()}


@pytest.mark.parametrize("stop", [1, 5])
def test_a_resumed_correction_gives_the_same_bits(make_work, stop):
    wanted = fit(make_work())
    shutil.rmtree(make_work().scratch)

    def interrupt(step):
        if step == stop + 1:
            raise Stop

    with pytest.raises(Stop):
        fit(make_work(), interrupt, snapshot_seconds=0)
    found, log = read_snapshot(make_work().scratch), []
    assert found is not None
    assert any("lm_head" in name for name in found.weights if name.startswith("objective."))
    got = fit(make_work(log=log), snapshot_seconds=0)
    assert f"resuming after step {stop}" in log
    assert got.keys() == wanted.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_the_teacher_learns_at_its_own_rate_and_apart_from_the_student(make_work):
    """Its weights are those of plain fine-tuning at that rate: the student has no part in it."""
    teacher = pico("llama", seed=1)
    fit(make_work(), teacher=teacher, lr=1e-3, clip=0.1)
    lines = (make_work().scratch / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    rates = [(line["step"], line["lr"], line["teacher lr"]) for line in told]
    assert rates[0] == pytest.approx((1, 3e-3 / 3, 1e-3 / 3))  # one of two steps of warm-up
    assert rates[-1][0] == 8 and rates[-1][2] == pytest.approx(rates[-1][1] / 3)
    shutil.rmtree(make_work().scratch)
    alone = pico("llama", seed=1)
    settings = Train(**SHORT | {"steps": 8, "lr": 1e-3, "clip": 0.1})
    work = make_work()
    objective = ce.objective(ce.Options(train=settings), alone, None)
    train(alone, work.batches("train", 8), objective, settings, work)
    before = pico("llama", seed=1).module.state_dict()
    lines = (work.scratch / "metrics.jsonl").read_text().splitlines()
    assert not any("teacher" in line for line in lines)
    for name, value in alone.module.state_dict().items():
        torch.testing.assert_close(teacher.module.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert not torch.equal(before["lm_head.weight"], alone.module.lm_head.weight)


def test_fixed_tables_stay_and_quantized_teachers_are_refused():
    student, teacher = pico("whisper"), pico("whisper", seed=1)
    teacher.module.requires_grad_(False)
    options = kd.Options(correct_teacher={})
    objective = kd.objective(options, student, teacher)
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert trained and not any("encoder.embed_positions" in name for name in trained)
    assert torch.isfinite(objective(labelled(student)))
    teacher.formats["model.encoder.layers.0.fc1"] = WeightFormat(bits=8)
    with pytest.raises(CompressError, match="the teacher is quantized"):
        kd.objective(options, student, teacher)
