"""What a search costs: enumerating shapes, and one step of retraining a candidate, by size.

The models are those of *Cost by size*. Shapes are enumerated under half of the parameters with the
lists of search.minitron's defaults. One candidate of half the heads and half the MLP is then
retrained for three steps of 8 rows of 64 tokens with KL to the original, which is in memory beside
it, after the same was done on the smallest model. Extra memory is the peak minus what the process
held before the candidate was made: its weights, gradients and Adam's two moments, and activations.
A search takes candidates x steps; those of its defaults, 12 x 400, have 16 rows of 128 tokens, four
times as many as here. 1 second to 3 minutes a cell.
"""

import os
import tempfile
import time
from functools import partial
from pathlib import Path

import memory_worker
import minitron_cost
import numpy as np
import torch
from cells import table
from sweep import NOT_RUN

from compressor.distill import kd
from compressor.distill.runner import run as train
from compressor.model.budget import TargetSizes
from compressor.model.checkpoint import load_directory
from compressor.prune import minitron
from compressor.run.search_stages import planned_shapes
from compressor.screen import Silent
from compressor.search.minitron import Options
from compressor.training.options import Train
from compressor.training.workbench import Workbench

TITLE = "Cost of a search by size"
SIZES = tuple(minitron_cost.SIZES)
STEPS = 3


def retrain(folder):
    """Enumerate, then prune and retrain one candidate beside its teacher."""
    teacher = load_directory(Path(folder))
    memory_worker.own(teacher)
    start = time.perf_counter()
    shapes = planned_shapes(teacher.family, teacher.config, Options(parameters=0.5))
    facts = {"shapes": len(shapes), "enumerate_seconds": time.perf_counter() - start}
    facts["model"] = memory_worker.weight_bytes(teacher)
    before = teacher.sizes
    half = TargetSizes(heads=before["heads"] // 2, mlp=before["mlp"] // 2)

    def batches(split, n, **shape):
        rows, length = shape.get("batch", 8), shape["length"]
        ids = torch.randint(3, before["vocabulary"], (rows, length))
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * (n or 1)

    options = kd.Options(
        train=Train(steps=STEPS, batch=8, length=64, precision="float32", snapshot_seconds=1e6)
    )
    with tempfile.TemporaryDirectory() as scratch:
        work = Workbench(
            *(0, torch.device("cpu"), Path(scratch), Silent(), lambda line: None),
            **{"_batches": batches, "_teacher": lambda: teacher, "_reference": None},
        )

        def candidate():
            student = load_directory(Path(folder))
            minitron.run(student, minitron.Options(sizes=half, samples=8, length=64), work)
            return train(student, kd.objective(options, student, teacher), options, work)

        costs, trained = memory_worker.measured(candidate)
    step = trained["seconds"] / STEPS
    return facts | {"step_seconds": step, "candidate": costs, "load": os.getloadavg()[0]}


def run(cells, model, seeds):
    """All sizes; the model and the seeds of the other experiments do not matter here."""
    for size in SIZES:
        cells.run(f"search cost {size}", partial(minitron_cost.cell, size, retrain))


def section(cells):
    """A row for every size, and how a step grows."""
    found = {size: cells.found.get(f"search cost {size}") for size in SIZES}
    rows = [[size, *_row(cell)] for size, cell in found.items()]
    header = ["size", "model MB", "shapes", "enumeration s", "step s", "extra MB", "load"]
    done = [c for c in found.values() if c]
    blocks = [table(header, rows)]
    if len(done) > 2:
        sizes, steps = ([c[key] for c in done] for key in ("model", "step_seconds"))
        slope = np.polyfit(np.log(sizes), np.log(steps), 1)[0]
        blocks.append(
            f"Seconds of a step grow with the bytes of the model to the power of {slope:.2f}; one "
            "is what to expect. Enumeration counts shapes by formula: it depends on how many "
            "sizes an axis has, not on the weights."
        )
    return blocks


def _row(found):
    if found is None:
        return [NOT_RUN] * 6
    extra = (found["candidate"]["peak"] - found["candidate"]["before"]) / 1e6
    numbers = (found["model"] / 1e6, found["shapes"], found["enumerate_seconds"])
    shown = [f"{numbers[0]:.1f}", str(numbers[1]), f"{numbers[2]:.2f}"]
    return [*shown, f"{found['step_seconds']:.3f}", f"{extra:.0f}", f"{found['load']:.1f}"]
