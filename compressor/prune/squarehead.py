"""Sparse finetuning: prune in one shot, then train what is left with SquareHead.

arXiv 2310.06927 (Sparse Fine-tuning for Inference Acceleration of Large Language Models). The
parent is a model that was finetuned on the task, dense; it is pruned by `start`, SparseGPT as in
the paper, with calibration rows of the task, and trained under a fixed mask with

    L = CE + sum_l mean (h_s^l - h_t^l)^2 / (mean (h_t^l)^2 + eps)         (distill/squarehead.py)

Its teacher is the dense model: `teacher: stage:N`, N being the parent's stage. For high sparsity
`gradual` names sparsities on the way: each round prunes the model that the last one trained and
trains it again, with an equal share of the steps and a learning rate schedule of its own. The
rounds before an N:M target are unstructured, and what they removed stays zero, so the last model
may have more zeros than N:M asks for.

Where we differ: the paper switches gradient clipping off, because pruned weights count in the norm;
here their gradient is zero, so clipping stays on. One-shot results are kept in scratch until the
stage is complete: a run that was stopped goes on with the masks it had.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from compressor.distill import runner
from compressor.distill import squarehead as retraining
from compressor.distill.squarehead import asks_teacher, objective
from compressor.model.model import Model
from compressor.numerics.masks import UNSTRUCTURED, group_of
from compressor.options import options
from compressor.prune import magnitude, sparsegpt, wanda
from compressor.prune.oneshot import OneShotOptions
from compressor.prune.rounds import keep_start, restore_start, round_folder, weights
from compressor.training import metrics
from compressor.training.batches import Batches
from compressor.training.parallel import alone, team
from compressor.training.snapshot import digest
from compressor.training.workbench import Batch, Workbench

__all__ = ["Options", "asks_teacher", "objective", "run"]

_STARTS: dict[str, ModuleType] = {"sparsegpt": sparsegpt, "wanda": wanda, "magnitude": magnitude}


@options
class Options(OneShotOptions, retraining.Options):
    """How many weights go, how they are chosen, and how the rest is trained."""

    start: Literal["sparsegpt", "wanda", "magnitude"] = Field(
        "sparsegpt", description="one-shot method that chooses the weights"
    )
    gradual: list[float] = Field(
        [], description="rising sparsities on the way, each pruned and trained for equally long"
    )

    @property
    def reads_data(self) -> bool:
        """Whether the one-shot method reads calibration sequences."""
        return self.start != "magnitude"

    @property
    def solves(self) -> bool:
        """Whether the one-shot method does."""
        return self.start == "sparsegpt"

    @model_validator(mode="after")
    def _rising(self) -> "Options":
        path = [0.0, *self.gradual, self.share]
        if any(not low < high for low, high in pairwise(path)):
            raise ValueError(f"gradual must rise from above 0 to below {self.share:g}")
        if len(self.gradual) >= self.train.steps:
            raise ValueError(f"{len(path) - 1} rounds need as many train.steps, or more")
        if self.gradual and self.undivided == "dense":
            raise ValueError("gradual would prune the layers that undivided: dense leaves dense")
        if self.offload:
            raise ValueError("offload: true keeps one block in memory, and training needs them all")
        return self


@dataclass(frozen=True)
class _Round:
    """One time of pruning and training.

    Attributes:
        number: from 1.
        before: steps of the rounds before.
    """

    number: int
    pattern: str
    sparsity: float
    steps: int
    before: int


def rounds_of(options: Options) -> list[_Round]:
    """What each round prunes to and how long it trains; steps that are left over go first."""
    goals = [(UNSTRUCTURED, sparsity) for sparsity in options.gradual]
    goals.append((options.pattern, options.share))
    found, before = [], 0
    for number, goal in enumerate(goals, start=1):
        steps = -(-(options.train.steps - before) // (len(goals) - number + 1))
        found.append(_Round(number, *goal, steps, before))
        before += steps
    return found


def run(model: Model, options: Options, work: Workbench) -> None:
    """Prune and train `model` in place, round by round; fill `model.formats` and notes.

    notes["rounds"] has the facts of each round; losses on the validation split are the last one's,
    before and after its training.

    Raises:
        CompressError: the teacher has another shape, or what the one-shot method and the training
            raise.
    """
    teacher = work.teacher if asks_teacher(options) else None
    loss, rounds = objective(options, model, teacher), rounds_of(options)
    identity = f"{options} {work.seed} {digest(weights(model))}"
    with team().leader_first():
        started = restore_start(model, identity, len(rounds), work)
    for this in rounds[max(0, started - 1) :]:
        with team().leader_first():  # it prunes and writes, the others read
            if this.number > started:  # another process may have read this start by now
                _start(model, options, this, identity, work)
        _train(model, loss, options, this, work)
    runner.note_curves(model, options.train, work)
    made, totals = model.notes["rounds"], ("steps", "tokens", "seconds")
    sums = {key: sum(each["training"][key] for each in made) for key in totals}
    last = model.notes["training"]
    if "best_step" in last:
        sums["best_step"] = rounds[-1].before + last["best_step"]
    model.notes["training"] = last | sums


def _start(model: Model, options: Options, this: _Round, identity: str, work: Workbench) -> None:
    """Prune in one shot, or take over what the leader pruned."""
    if not team().leads:
        restore_start(model, identity, this.number, work)
        return
    torch.manual_seed(work.seed + this.number)
    method: Any = _STARTS[options.start]
    known = {field.name for field in fields(method.Options)} - {"pattern", "sparsity"}
    given = {name: getattr(options, name) for name in known & {f.name for f in fields(Options)}}
    sparsity = this.sparsity if group_of(this.pattern) is None else None
    with alone():
        method.run(model, method.Options(pattern=this.pattern, sparsity=sparsity, **given), work)
    keep_start(model, identity, this.number, work)


def _train(model: Model, loss: nn.Module, options: Options, this: _Round, work: Workbench) -> None:
    """Train for the steps of a round; notes["rounds"] gets its facts, metrics.jsonl its lines."""
    torch.manual_seed(work.seed + this.number)
    inside = _inside(work, this, this.before * options.train.accumulate)
    own = replace(options, gradual=[], train=replace(options.train, steps=this.steps))
    facts = runner.run(model, loss, own, inside)
    made = {"pattern": this.pattern, "sparsity": this.sparsity, "training": facts}
    if "validation" in model.notes:
        made["validation"] = model.notes["validation"]
    model.notes.setdefault("rounds", []).append(made)
    if team().leads:
        metrics.cut_back(work.scratch, this.before)
        for record in metrics.read(inside.scratch):
            line = record | {"step": this.before + record["step"], "round": this.number}
            metrics.append(work.scratch, line)


def _inside(work: Workbench, this: _Round, skipped: int) -> Workbench:
    """The surroundings of a round: its own scratch, and rows that no round before has seen."""
    place = round_folder(work, this.number)

    def batches(split: str, n: int | None, **shape: Any) -> Sequence[Batch]:
        if split != "train" or n is None:
            return work.batches(split, n, **shape)
        every = work.batches(split, skipped + n, **shape)
        return Batches(n, lambda i: every[skipped + i])

    return replace(work, scratch=place, _batches=batches, _teacher=lambda: work.teacher)
