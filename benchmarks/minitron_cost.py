"""What pruning costs: time and memory of importance and of trimming, by size of the model.

Llamas of random weights, in bfloat16 on disk, loaded as compressor does. Importance is one forward
pass over 512 tokens (8 rows of 64); trimming keeps half of the heads of every group and half of
the MLP in memory and saves the result. Every cell is a process of its own that has done the same
on the smallest model before. Extra memory is the peak during the action minus what the process
held before it. 1 second to 4 minutes a cell.
"""

import os
import tempfile
from functools import partial
from pathlib import Path

import memory_worker
import numpy as np
import torch
from cells import table
from memory import alone
from sweep import NOT_RUN

from compressor.model.budget import TargetSizes
from compressor.model.checkpoint import load_directory
from compressor.model.importance import measure_importance
from compressor.model.saving import save
from compressor.model.shrink import shrink
from compressor.prune import minitron

TITLE = "Cost by size"
SIZES = {  # hidden, layers, heads, kv_heads, mlp, vocabulary
    "1M": (128, 4, 4, 2, 384, 512),
    "10M": (320, 8, 8, 4, 896, 1024),
    "100M": (768, 12, 12, 6, 2304, 8192),
    "300M": (1024, 20, 16, 8, 3072, 16384),
    "1B": (2048, 20, 16, 4, 5632, 32000),
}
ROWS, LENGTH = 8, 64


def make(size, folder):
    """Write a checkpoint in bfloat16."""
    torch.manual_seed(0)
    model = memory_worker.llama(*SIZES[size])
    model.source_dtype = "bfloat16"
    save(model, Path(folder), Path(folder))


def prune(folder):
    """Importance and trimming of one checkpoint, each measured."""
    model = load_directory(Path(folder))
    memory_worker.own(model)
    held, before = memory_worker.weight_bytes(model), model.sizes
    options = minitron.Options(
        sizes=TargetSizes(heads=before["heads"] // 2, mlp=before["mlp"] // 2)
    )
    ids = torch.randint(3, before["vocabulary"], (ROWS, LENGTH))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    scored, scores = memory_worker.measured(lambda: measure_importance(model, batches))
    with tempfile.TemporaryDirectory(dir=folder) as out:

        def trim():
            after = minitron._target(model, options)
            shrink(model, minitron._keep(model, scores, before, after))
            save(model, Path(out), Path(folder))

        trimmed, _ = memory_worker.measured(trim)
    return {"importance": scored, "trimming": trimmed, "model": held, "load": os.getloadavg()[0]}


def warmed(act, tiny, folder):
    """All code in memory before the measurement."""
    act(tiny)
    return act(folder)


def cell(size, act=prune):
    """Make a checkpoint, do `act(folder)` in a process of its own, delete it."""
    with tempfile.TemporaryDirectory() as tiny, tempfile.TemporaryDirectory() as folder:
        alone(make, "1M", tiny)
        alone(make, size, folder)
        return alone(warmed, act, tiny, folder)


def run(cells, model, seeds):
    """All sizes; the model and the seeds of the other experiments do not matter here."""
    for size in SIZES:
        cells.run(f"cost {size}", partial(cell, size))


def section(cells):
    """Times and memory, the slopes of their logarithms, and a plot."""
    found = {size: cells.found.get(f"cost {size}") for size in SIZES}
    rows = [[size, *_row(cell)] for size, cell in found.items()]
    header = ["size", "model MB", "importance s", "extra MB", "trimming s", "extra MB", "load"]
    done = [cell for cell in found.values() if cell]
    blocks = [table(header, rows)]
    if len(done) > 2:
        plot(done, cells.page.with_name("minitron-cost.svg"))
        blocks += ["![seconds by parameters](minitron-cost.svg)", _slopes(done)]
    return blocks


def _row(cell):
    if cell is None:
        return [NOT_RUN] * 6
    numbers = [f"{cell['model'] / 1e6:.1f}"]
    for action in ("importance", "trimming"):
        extra = (cell[action]["peak"] - cell[action]["before"]) / 1e6
        numbers += [f"{cell[action]['seconds']:.3f}", f"{extra:.1f}"]
    return [*numbers, f"{cell['load']:.1f}"]


def _slopes(done):
    size = np.log([cell["model"] for cell in done])
    times = [np.log([c[a]["seconds"] for c in done]) for a in ("importance", "trimming")]
    slopes = [np.polyfit(size, time, 1)[0] for time in times]
    last = [(time[-1] - time[-2]) / (size[-1] - size[-2]) for time in times]
    return (
        f"Seconds grow with the bytes of the model to the power of {slopes[0]:.2f} (importance) "
        f"and {slopes[1]:.2f} (trimming), and of {last[0]:.2f} and {last[1]:.2f} between the two "
        "largest. One is what to expect: a forward pass reads and uses every weight a fixed number "
        "of times per token, and trimming copies and writes every kept weight once. Below one, "
        "fixed costs of each layer and file weigh on small models; above one at the end, the "
        "likely cause (not measured) is a file too large to stay in the system's write buffers. "
        "`load` is the load average of the two cores at the end of the cell; times of a loaded "
        "machine are upper bounds."
    )


def plot(done, path, width=460, height=300, margin=45):
    """Seconds over parameters, both logarithmic, as SVG."""
    x = np.log10([cell["model"] / 4 for cell in done])
    curves = {a: np.log10([c[a]["seconds"] for c in done]) for a in ("importance", "trimming")}
    low, high = (f([f(y) for y in curves.values()]) for f in (np.min, np.max))
    across = margin + (x - x.min()) / np.ptp(x) * (width - 2 * margin)
    marks = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for (name, y), colour in zip(curves.items(), ("#1b6ca8", "#c8553d"), strict=True):
        down = height - margin - (y - low) / (high - low) * (height - 2 * margin)
        points = [f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True)]
        marks.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}"/>')
        marks.append(f'<text x="{across[-1] - 60:.0f}" y="{down[-1] - 8:.0f}">{name}</text>')
        marks += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"><title>{name}: {10**t:.3g} s'
            "</title></circle>"
            for a, b, t in zip(across, down, y, strict=True)
        ]
    ends = f"{10**low:.2g} s to {10**high:.2g} s, {10 ** x.min():.2g} to {10 ** x.max():.2g}"
    marks.append(f'<text x="{margin}" y="{height - 12}">{ends} parameters (log, log)</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    body = "\n".join(marks)
    path.write_text(f'{head} font-size="12" font-family="sans-serif">\n{body}\n</svg>\n')
