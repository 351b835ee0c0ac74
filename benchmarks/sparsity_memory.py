"""Memory of SparseGPT while the model grows eightfold, in memory and with `offload: true`.

Llamas of random weights and one width (hidden 1024, MLP 2816, 1,024 tokens), bfloat16 on disk,
pruned to 2:4 with 8 sequences of 64 tokens, saved, loaded back and compared, as a stage of a run
is. Every cell is a process of its own that has done the same on a tiny model before. Anonymous
memory is what cannot be dropped and read again (RssAnon), sampled every 5 ms; resident memory also
counts mapped files, which the system takes back when it needs room. 1 to 5 minutes a cell.
"""

import os
import tempfile
from functools import partial
from pathlib import Path

import memory_worker
import torch
from cells import table
from memory import alone
from sweep import NOT_RUN
from watched import watched

from compressor.model.checkpoint import load_directory
from compressor.model.saving import save
from compressor.prune import sparsegpt
from compressor.run.machine import give_back_memory
from compressor.run.prove import save_and_prove
from compressor.screen import Silent
from compressor.training.workbench import Workbench

TITLE = "Memory by size"
LAYERS = {"50M": 4, "100M": 8, "200M": 16, "400M": 32}
WIDTH, MLP, VOCABULARY = 1024, 2816, 1024
ROWS, LENGTH = 8, 64


def make(layers, folder, width=WIDTH, mlp=MLP):
    """Write a checkpoint in bfloat16."""
    torch.manual_seed(0)
    model = memory_worker.llama(width, layers, 16, 16, mlp, VOCABULARY)
    model.source_dtype = "bfloat16"
    save(model, Path(folder), Path(folder))


def prune(folder, offload):
    """One stage, with the peak of anonymous memory beyond what the process held before."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch, tempfile.TemporaryDirectory() as out:
        give_back_memory()
        call = partial(memory_worker.measured, partial(stage, folder, offload, scratch, out))
        (found, size), extra, _ = watched(call, "RssAnon")
    load = os.getloadavg()[0]
    return found | {"anonymous": extra, "parameters": size, "load": load}


def stage(folder, offload, scratch, out):
    """Load, prune, save and prove; the number of parameters."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=draw)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    read = lambda split, n, **shape: batches  # noqa: E731
    screen, spill = Silent(), Path(scratch) if offload else None
    work = Workbench(
        0, torch.device("cpu"), Path(scratch), screen, lambda line: None, read, None, None
    )
    model = load_directory(Path(folder), None, spill)
    options = sparsegpt.Options(pattern="2:4", samples=ROWS, length=LENGTH, offload=offload)
    sparsegpt.run(model, options, work)
    return save_and_prove(model, Path(out), Path(folder), spill).metrics["parameters"]


def warmed(tiny, folder, offload):
    """All code in memory before the measurement."""
    prune(tiny, offload)
    return prune(folder, offload)


def cell(layers, offload):
    """Make a checkpoint, prune it in a process of its own, delete it."""
    with tempfile.TemporaryDirectory() as tiny, tempfile.TemporaryDirectory() as folder:
        alone(make, 1, tiny, 64, 128)
        alone(make, layers, folder)
        return alone(warmed, tiny, folder, offload)


def run(cells, model, seeds):
    """All sizes; the model and the seeds of the other experiments do not matter here."""
    for size, layers in LAYERS.items():
        for offload in (True, False):
            cells.run(name(size, offload), partial(cell, layers, offload))


def name(size, offload):
    """Name of a cell."""
    return f"memory {size}{' offload' if offload else ''}"


def section(cells):
    """A row for each size."""
    header = ["size", "weights MB", "anonymous MB", "with offload MB", "seconds", "with offload"]
    rows = []
    for size in LAYERS:
        plain, spilled = (cells.found.get(name(size, offload)) for offload in (False, True))
        known = plain or spilled
        row = [size, f"{known['parameters'] * 4 / 1e6:.0f}" if known else NOT_RUN]
        for key, scale in (("anonymous", 1e6), ("seconds", 1)):
            row += [f"{c[key] / scale:.0f}" if c else NOT_RUN for c in (plain, spilled)]
        rows.append(row)
    return [table(header, rows)]
