"""Sparse finetuning: its masks, its rounds, and a run that is stopped and goes on."""

import dataclasses
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressor.errors import CompressError
from compressor.model.sparse import broken_promise, prunable
from compressor.numerics.masks import keep_largest, most_in_a_group, share_of_zeros
from compressor.prune import squarehead
from compressor.prune.squarehead import Options
from compressor.training import metrics
from families import pico
from predicting import labelled

FAMILIES = ("llama", "gpt2", "bert", "t5", "whisper", "vit")
TRAIN = {"batch": 3, "lr": 1e-2, "warmup": 0, "precision": "float32", "snapshot_seconds": 0}


def options(steps=4, **given):
    train = TRAIN | {"steps": steps, "length": 11}
    return Options(start="magnitude", train=train, **{"sparsity": 0.5, **given})


class Stopped(Exception):
    """What a killed run is in these tests."""


def surroundings(model, make_work, folder, stop=None, log=None):
    """A workbench with rows for the model's task; reading training batch `stop` stops the run."""
    teacher = pico(model.family.model_type, head=model.task != "feature-extraction")
    teacher.module.requires_grad_(False)

    class Rows(list):
        def __getitem__(self, index):
            if index == stop:
                raise Stopped
            return super().__getitem__(index)

    def batches(split, n, **shape):
        made = [labelled(model, seed=i) for i in range(2 if n is None else n)]
        return Rows(made) if split == "train" else made[:1]

    work = make_work(teacher, log=log)
    folder.mkdir(exist_ok=True)
    return dataclasses.replace(work, scratch=folder, _batches=batches)


def weights(model):
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_are_those_of_the_one_shot_method_and_hold(name, make_work, tmp_path):
    model, dense = pico(name), pico(name)
    squarehead.run(model, options(), surroundings(model, make_work, tmp_path / "a"))
    assert set(model.formats) == set(prunable(dense)) and not broken_promise(model, model.formats)
    for key, linear in prunable(dense).items():
        kept = keep_largest(linear.weight.detach().abs(), "unstructured", 0.5, "matrix")
        trained = model.module.get_submodule(key).weight
        assert torch.equal(trained != 0, kept)
        assert not torch.equal(trained[kept], linear.weight[kept])
    assert model.notes["training"]["steps"] == 4


def test_an_encoder_without_a_head_learns_from_states_alone(make_work, tmp_path):
    model = pico("bert", head=False)
    work = surroundings(model, make_work, tmp_path / "a")
    with pytest.raises(CompressError, match="feature-extraction"):
        squarehead.run(model, options(), work)
    squarehead.run(model, options(ce=0.0, steps=12), work)
    losses = [loss for _, loss in model.notes["loss"]]
    assert losses[-1] < losses[0]


def test_gradual_rounds_end_at_the_target(make_work, tmp_path):
    model, log = pico("llama"), []
    work = surroundings(model, make_work, tmp_path / "a", log=log)
    wanted = options(steps=7, sparsity=0.75, gradual=[0.5, 0.6])
    squarehead.run(model, wanted, work)
    shares = [share_of_zeros(m.weight) for m in prunable(model).values()]
    assert all(share == pytest.approx(0.75, abs=1e-3) for share in shares)
    rounds = model.notes["rounds"]
    assert [r["sparsity"] for r in rounds] == [0.5, 0.6, 0.75]
    assert [r["training"]["steps"] for r in rounds] == [3, 2, 2]
    assert model.notes["training"]["steps"] == 7
    lines = metrics.read(work.scratch)
    assert [(line["round"], line["step"]) for line in lines] == [
        *((1, 1), (1, 3)),
        *((2, 4), (2, 5)),
        *((3, 6), (3, 7)),
    ]
    assert {"ce", "squarehead"} <= set(lines[0])
    assert model.notes["validation"] == rounds[2]["validation"] != rounds[0]["validation"]


def test_unstructured_rounds_may_come_before_groups(make_work, tmp_path):
    model = pico("llama")
    work = surroundings(model, make_work, tmp_path / "a")
    squarehead.run(model, options(sparsity=None, pattern="2:4", gradual=[0.3]), work)
    assert {form.pattern for form in model.formats.values()} == {"2:4"}
    assert all(most_in_a_group(m.weight, 4) <= 2 for m in prunable(model).values())


def run_on(make_work, folder, stop=None, log=None, model=None):
    model = model or pico("llama")
    work = surroundings(model, make_work, folder, stop, log)
    squarehead.run(model, options(steps=6, gradual=[0.3]), work)
    return model


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_a_stopped_run_ends_with_the_same_bits(stop, make_work, tmp_path):
    whole, log = run_on(make_work, tmp_path / "whole"), []
    with pytest.raises(Stopped):
        run_on(make_work, tmp_path / "part", stop)
    resumed = run_on(make_work, tmp_path / "part", log=log)
    assert f"round {1 if stop < 3 else 2} goes on with the masks it had" in log
    assert stop in (0, 3) or f"resuming after step {stop % 3}" in log
    assert resumed.formats == whole.formats
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight), name
    keep = ("rounds", "loss", "validation")
    timeless = [[r["pattern"] for r in m.notes["rounds"]] for m in (whole, resumed)]
    assert timeless[0] == timeless[1] and set(keep) <= set(resumed.notes)
    assert resumed.notes["loss"] == whole.notes["loss"]


def test_masks_that_are_not_of_this_run_are_made_anew(make_work, tmp_path):
    whole, folder = run_on(make_work, tmp_path / "whole"), tmp_path / "part"
    with pytest.raises(Stopped):
        run_on(make_work, folder, stop=4)
    start = folder / "round-2" / "start.safetensors"
    changed = load_file(start)
    first = next(name for name in changed if "q_proj" in name)
    changed[first] = changed[first].roll(1, 1)  # other masks, as many zeros
    with safe_open(start, "pt") as opened:
        facts = opened.metadata()
    save_file(changed, start, facts)
    log = []
    resumed = run_on(make_work, folder, log=log)
    assert "the masks in scratch are of another run, or damaged: pruning anew" in log
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(whole).items())


def test_another_parent_does_not_take_the_masks(make_work, tmp_path):
    folder, log = tmp_path / "part", []
    with pytest.raises(Stopped):
        run_on(make_work, folder, stop=4)
    other = pico("llama", seed=5)
    resumed = run_on(make_work, folder, log=log, model=other)
    assert any("pruning anew" in line for line in log)
    shutil.rmtree(folder)
    fresh = run_on(make_work, folder, model=pico("llama", seed=5))
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(fresh).items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gradual": [0.4, 0.3]}, "must rise from above 0 to below 0.5"),
        ({"gradual": [0.5]}, "must rise"),
        ({"gradual": [0.1, 0.2, 0.3, 0.4]}, "5 rounds need as many train.steps"),
        ({"sparsity": None, "pattern": "2:4", "gradual": [0.3], "undivided": "dense"}, "leaves"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "leave sparsity out"),
        ({"ce": 0.0, "squarehead": 0.0}, "must be above 0"),
    ],
)
def test_options_that_exclude_each_other(given, said):
    with pytest.raises(ValidationError, match=said):
        options(**given)


@pytest.mark.parametrize("start", ["sparsegpt", "wanda"])
@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_every_start_gives_groups_that_hold(name, start, make_work, tmp_path):
    model, log = pico(name), []
    work = surroundings(model, make_work, tmp_path / "a", log=log)
    wanted = options(sparsity=None, pattern="2:4", samples=4, length=11)
    squarehead.run(model, dataclasses.replace(wanted, start=start), work)
    assert {form.pattern for form in model.formats.values()} == {"2:4"}
    assert set(model.formats) == set(prunable(model))
    assert all(most_in_a_group(m.weight, 4) <= 2 for m in prunable(model).values())
    assert not broken_promise(model, model.formats)


def test_cross_entropy_alone_loads_no_teacher(make_work, tmp_path):
    def nobody():
        raise AssertionError("nobody asks the teacher")

    model = pico("llama")
    work = surroundings(model, make_work, tmp_path / "a")
    squarehead.run(model, options(squarehead=0.0), dataclasses.replace(work, _teacher=nobody))
    assert model.notes["training"]["steps"] == 4 and not broken_promise(model, model.formats)
    lines = metrics.read(tmp_path / "a")
    assert lines and all("ce" in line and "squarehead" not in line for line in lines)
