"""Seconds and memory of quantizing, beside llm-compressor.

A Llama of random weights (hidden 1024, MLP 2816, 1,024 tokens) in float32, 4 bits in groups of 128,
symmetric, 32 random rows of 512 tokens, head and embeddings left float. CPU seconds of the call on
one thread, and the peak of resident memory beyond that of a process that has only imported, the
model included, and beyond the loaded model. AWQ, 25 minutes in llm-compressor, was measured
without the model only. The same rows and layers in both. Random weights: cost only.
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch
from cells import DATA, table
from memory import alone
from peers import PEER, ask, fresh
from sparsity_memory import make
from sweep import NOT_RUN
from watched import cost

from compressor.model.checkpoint import load_directory
from compressor.quantize import awq, gptq, rtn
from compressor.screen import Silent
from compressor.training.workbench import Workbench

TITLE = "Cost beside llm-compressor"
MODELS = ("random",)
LAYERS = {"50M": 4, "100M": 8}
ROWS, LENGTH = 32, 512
TOKENIZER = DATA / "checkpoints" / "stories260K"
GRID = {"bits": 4, "group": 128, "symmetric": True, "embeddings": False, "head": False}
MEASURED = {"cpu_seconds": 1, "whole_bytes": 1e6, "extra_bytes": 1e6}
METHODS = {"RTN": (rtn, "rtn"), "GPTQ": (gptq, "gptq"), "AWQ": (awq, "awq")}


def rows():
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1024, (ROWS, LENGTH), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ours(folder, arm):
    """Quantize a loaded model; what it took."""
    method, _ = METHODS[arm]
    given = rows()
    data = {} if method is rtn else {"samples": ROWS, "length": LENGTH}

    def read(split, n, batch, length):
        return [{k: v[i : i + batch] for k, v in given.items()} for i in range(0, ROWS, batch)]

    with tempfile.TemporaryDirectory() as scratch:
        surroundings = (0, torch.device("cpu"), Path(scratch), Silent(), lambda line: None)
        work = Workbench(*surroundings, read, None, None)
        options = method.Options(**GRID, **data)
        return cost(
            lambda: load_directory(Path(folder)), lambda model: method.run(model, options, work)
        )


def theirs(folder, arm):
    """The same by the peer, in a fresh process."""
    fresh()
    for file in TOKENIZER.glob("tokenizer*"):  # it wants one, and reads ids
        shutil.copy(file, folder)
    job = {"model": folder, "task": "causal-lm", "method": METHODS[arm][1], "activation": None}
    job |= {k: GRID[k] for k in ("bits", "group", "symmetric")}
    return ask(job | {"ignore": ["lm_head"], "uneven": []}, rows())[0]


def cell(layers, arm, whose):
    with tempfile.TemporaryDirectory() as folder:
        alone(make, layers, folder)
        return alone(ours, folder, arm) if whose == "ours" else theirs(folder, arm)


def name(size, arm, whose):
    return f"cost {size} {arm} {whose}"


def run(cells, model, seeds):
    """Every size and method; seeds do not matter."""
    for size, layers in LAYERS.items():
        for arm in METHODS:
            for whose in ("ours", "llm-compressor") if PEER else ("ours",):
                cells.run(name(size, arm, whose), partial(cell, layers, arm, whose))


def section(cells):
    """A row for each size and method."""
    rows = []
    for size in LAYERS:
        for arm in METHODS:
            pair = [cells.found.get(name(size, arm, w)) for w in ("ours", "llm-compressor")]
            row = [f"{size}, {arm}"]
            for key, scale in MEASURED.items():
                values = [c.get(key) if c else None for c in pair]
                row += [NOT_RUN if v is None else f"{v / scale:.1f}" for v in values]
                row.append("" if None in values else f"{values[0] / values[1]:.2f}")
            rows.append(row)
    header = ["model, method", "s", "llm-compressor s", "ratio", "MB", "llm-compressor MB", "ratio"]
    return [table([*header, "beyond the model", "llm-compressor", "ratio"], rows)]
