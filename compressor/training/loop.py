"""The one training loop. It does not know what it trains, or with which loss.

A step is `accumulate` forward and backward passes, a clipped gradient, the optimizer's step and
`after_step`. Dropout is off, weights are float32, bfloat16 is autocast only. A run that is
stopped goes on from its last snapshot and ends with the same bits as one that was not. Under
torchrun a batch is shared out by rows and gradients are averaged (training/parallel.py). With
`validate_every` it ends with the weights of the best look, not the last (training/best.py).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.errors import CompressError
from compressor.model.model import Model
from compressor.model.qsd_layers import norms_of
from compressor.training import best, metrics
from compressor.training.batches import on_device, row_inputs
from compressor.training.learners import adamw, learners_of, rates_of, weights_of
from compressor.training.options import Train, lr_factor
from compressor.training.parallel import team
from compressor.training.precision import autocast, choose_precision
from compressor.training.snapshot import (
    State,
    digest,
    read_snapshot,
    remove_snapshots,
    set_random_state,
    without_trace,
    write_snapshot,
)
from compressor.training.workbench import Batch, Workbench

_EVERY = 10  # steps of one line of metrics


class NotFinite(CompressError):
    """The training diverged: its loss or gradient is NaN or infinite."""


@runtime_checkable
class Itemized(Protocol):
    """An objective that says what its last loss was made of; its parts go into the metrics."""

    parts: dict[str, Tensor]


@dataclass
class _Progress:
    """What a run has done so far; all of it is in a snapshot."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # of the last line of metrics
    recent: float = 0.0  # sum since then
    since: int = 0  # steps since then
    best: float | None = None  # least validation loss
    best_step: int = 0
    known_step: int = 0  # best_step of the last snapshot


def train(
    model: nn.Module | Model,
    batches: Sequence[Batch],
    objective: nn.Module,
    options: Train,
    work: Workbench,
    optimizer: Optimizer | None = None,
    after_step: Callable[[int], None] | None = None,
    identity: str = "",
    look: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Train the parameters of `model` that require gradients, and those of `objective`.

    Args:
        model: on `work.device`, float32; it is left in eval mode.
        batches: `steps * accumulate` of them.
        objective: batch -> scalar loss. Its parameters are trained with the model's, the buffers
            of both are part of a snapshot; it must not register the student or the teacher as
            submodules.
        optimizer: over the same parameters; AdamW when None. Its learning rates are the highest.
        after_step: called with the number of finished steps.
        identity: whatever else makes this run this run; a snapshot of another one is not used.
        look: the loss on validation rows, the same in all processes; `validate_every` wants it.

    Returns:
        {steps, tokens, seconds, loss, precision}; loss is the mean over the last steps. With
        `validate_every` also best_step, after which the weights were what they are now.

    Raises:
        NotFinite: the loss or its gradient is; earlier snapshots stay.
    """
    module = model.module if isinstance(model, Model) else model
    assert look is not None or not options.validate_every, "nothing to look at"
    _learning(module)
    objective.to(work.device)
    weights = weights_of(module, objective)
    learners = learners_of(weights, objective, options)
    optimizer = optimizer or adamw(learners, options)
    highest = [group["lr"] for group in optimizer.param_groups]
    start = {**module.state_dict(), **objective.state_dict(), "ids": row_inputs(batches[0])}
    identity = f"{identity} {options} {work.seed} {digest(start)}"
    state = weights | {
        **{f"objective.{k}": v for k, v in objective.named_buffers()},
        **{f"student.{k}": v for k, v in module.named_buffers()},  # batch norms learn in theirs
    }
    peers = team()
    batches = peers.share(batches)
    with peers.leader_first():  # it decides and writes, the others read
        done = _resume(state, optimizer, identity, work)
        first = on_device(batches[0], work.device)
        with without_trace(module):
            precision = choose_precision(objective, first, list(weights.values()), options, work)

    def snapshot() -> None:
        done.known_step = done.best_step
        facts = {"identity": identity, "progress": asdict(done)}
        write_snapshot(work.scratch, State(done.step, dict(state), optimizer.state_dict(), facts))

    saved = clock = time.perf_counter()
    with work.progress("train", options.steps) as advance:
        advance(done.step)
        while not best.is_over(done, options):
            loss = _backward(objective, batches, options, precision, work, done)
            peers.average(p.grad for p in weights.values() if p.grad is not None)
            for _, learner in learners:
                _clip(learner, options, done.step + 1)
            for group, lr in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = lr * lr_factor(options, done.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done.step += 1
            if after_step is not None:
                after_step(done.step)
            now = time.perf_counter()
            done.seconds, clock = done.seconds + now - clock, now
            done.recent, done.since = done.recent + loss, done.since + 1
            parts = dict(objective.parts) if isinstance(objective, Itemized) else {}
            if look is not None and best.looks_after(done.step, options):
                _look(look, module, state, done, work)
                clock = time.perf_counter()
            if done.step % _EVERY == 0 or done.step == 1 or best.is_over(done, options):
                _record(done, options, objective, parts, work)
            advance(1)
            due = now - saved >= options.snapshot_seconds or best.is_over(done, options)
            if due and peers.leads:
                snapshot()
                saved = time.perf_counter()
    module.eval()
    facts = {"steps": done.step, "tokens": done.tokens, "seconds": round(done.seconds, 2)}
    facts |= {"loss": done.loss, "precision": precision}
    if done.best is None:
        return facts
    if done.best_step < done.step:
        peers.meet()  # the leader may still write
        best.restore(work.scratch, done.best_step, state)
    return facts | {"best_step": done.best_step}


def _learning(module: nn.Module) -> None:
    """No dropout, but batch norms follow their inputs."""
    module.eval()
    for norm in norms_of(module):
        norm.train()


def _look(
    look: Callable[[], float],
    module: nn.Module,
    state: dict[str, Tensor],
    done: _Progress,
    work: Workbench,
) -> None:
    """Keep the weights of now if validation rows like them best."""
    module.eval()
    loss = look()
    _learning(module)
    if team().leads:
        metrics.append(work.scratch, {"step": done.step, "validation": loss})
    if best.is_better(loss, done):
        done.best, done.best_step = loss, done.step
        if team().leads:
            best.keep(work.scratch, done.step, state, done.known_step)


def _backward(
    objective: nn.Module,
    batches: Sequence[Batch],
    options: Train,
    precision: str,
    work: Workbench,
    done: _Progress,
) -> float:
    """Gradients of this process's rows in one step; returns the mean loss of all rows."""
    total, tokens, peers = 0.0, 0, team()
    for i in range(options.accumulate):
        batch = on_device(batches[done.step * options.accumulate + i], work.device)
        with autocast(precision, work.device):
            loss = objective(batch) / options.accumulate
        loss.backward()
        total += loss.item()
        tokens += _tokens(batch)
    means = torch.tensor([total, tokens], dtype=torch.float64)
    peers.average([means])
    _refuse_unless_finite(float(means[0]), "loss", done.step + 1)
    done.tokens += round(float(means[1]) * peers.size)
    return float(means[0])


def _tokens(batch: Batch) -> int:
    """Real tokens of source and answer; rows where there is no text at all (images)."""
    masks = [batch[k] for k in ("attention_mask", "decoder_attention_mask") if k in batch]
    return int(sum(mask.sum() for mask in masks)) or len(row_inputs(batch))


def _clip(weights: list[nn.Parameter], options: Train, step: int) -> None:
    norm = nn.utils.clip_grad_norm_(weights, options.clip)
    _refuse_unless_finite(float(norm), "gradient", step)


def _refuse_unless_finite(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise NotFinite(
            f"the {what} is {value} at step {step}; snapshots from before it, if any, are kept",
            "lower train.lr or raise train.warmup; at step 1, look for NaN in the model",
        )


def _record(
    done: _Progress,
    options: Train,
    objective: nn.Module,
    parts: dict[str, Tensor],
    work: Workbench,
) -> None:
    """A line of metrics: what is new since the last one, and what the last loss was made of."""
    done.loss, done.recent, done.since = done.recent / done.since, 0.0, 0
    factor = lr_factor(options, done.step - 1)
    record = {
        "step": done.step,
        "loss": done.loss,
        "lr": options.lr * factor,
        **{f"{name} lr": lr * factor for name, (_, lr) in rates_of(objective).items()},
        "tokens_per_second": round(done.tokens / done.seconds, 1),
    }
    means = {name: part.detach().double().cpu().reshape(()) for name, part in parts.items()}
    team().average(means.values())
    if team().leads:
        metrics.append(work.scratch, record | {name: float(part) for name, part in means.items()})


def _resume(
    state: dict[str, Tensor], optimizer: Optimizer, identity: str, work: Workbench
) -> _Progress:
    """Put the last snapshot of this very run back, if there is one."""
    found = read_snapshot(work.scratch)
    if found is not None and found.facts["identity"] != identity:
        work.log("the snapshot in scratch is of another run: starting anew")
        found = None
    if team().leads:
        if found is None:
            remove_snapshots(work.scratch)
            best.forget(work.scratch)
        metrics.cut_back(work.scratch, found.step if found else 0)
    if found is None:
        return _Progress()
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(found.weights[name])
    optimizer.load_state_dict(found.optimizer)
    set_random_state(found.random)
    work.log(f"resuming after step {found.step}")
    return _Progress(**found.facts["progress"])
