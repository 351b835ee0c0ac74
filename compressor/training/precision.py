"""float32 or bfloat16 autocast, decided by a short timing on the machine that trains.

bfloat16 is twice as fast where the CPU has instructions for it and many times slower where it
has none, so nothing but a measurement can say. Weights stay float32 either way.
"""

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from compressor.training.options import Train
from compressor.training.parallel import alone
from compressor.training.snapshot import flush, without_trace
from compressor.training.workbench import Batch, Workbench

_SECONDS = 2.0
_CLEARLY = 1.2  # times faster; less is not worth the lost digits


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context a forward pass runs in."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def choose_precision(
    objective: nn.Module, batch: Batch, weights: Sequence[Tensor], options: Train, work: Workbench
) -> str:
    """What `options` says; auto times both once and keeps the answer in scratch for a resume.

    No step has been made before the answer is kept, so a run that is killed here and times again
    is one that has only begun later.
    """
    if options.precision != "auto":
        return options.precision
    file = work.scratch / "precision.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))["precision"]
    with alone():
        seconds = _time_both(objective, batch, weights, work.device)
    faster = seconds["float32"] / seconds["bfloat16"]
    chosen = "bfloat16" if faster >= _CLEARLY else "float32"
    work.log(f"precision: bfloat16 is {faster:.2f} times as fast as float32, so {chosen}")
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"precision": chosen, "seconds": seconds}), encoding="utf-8")
    flush(partial)
    partial.rename(file)
    return chosen


def _time_both(
    objective: nn.Module, batch: Batch, weights: Sequence[Tensor], device: torch.device
) -> dict[str, float]:
    """Best seconds of one forward and backward pass; leaves no trace in any state."""
    best = {"float32": float("inf"), "bfloat16": float("inf")}
    with without_trace(objective):
        for precision in best:
            _one_pass(objective, batch, weights, precision, device)  # warm up
        begin = time.perf_counter()
        while time.perf_counter() - begin < _SECONDS:
            for precision in best:
                start = time.perf_counter()
                _one_pass(objective, batch, weights, precision, device)
                best[precision] = min(best[precision], time.perf_counter() - start)
    return best


def _one_pass(
    objective: nn.Module,
    batch: Batch,
    weights: Sequence[Tensor],
    precision: str,
    device: torch.device,
) -> None:
    with autocast(precision, device):
        loss = objective(batch)
    torch.autograd.grad(loss, weights, allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
