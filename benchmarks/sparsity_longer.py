"""Does AST come closer with more tokens? The arms that matter, 100 and 400 steps.

2:4 on novels-llama as in the experiment on retraining, at its best rate (0.0003, seed 0), with four
times as many batches: 1,024 tokens a step. The paper takes up to 40,000 steps of 131,072 tokens.
Four to eight minutes a cell.
"""

import math
from functools import partial

import sparsity_retraining as retraining
from cells import table
from sweep import NOT_RUN, key

TITLE = "Longer retraining"
MODEL, PATTERN, RATE, STEPS = "novels-llama", "2:4", 3e-4, 400
MODELS = (MODEL,)
ARMS = ("AST", "dense, trained", "AST + SLoRB", "SparseGPT, trained")


def run(cells, model, seeds):
    """Every arm once."""
    for arm in ARMS:
        make = partial(retraining.cell, MODEL, PATTERN, arm, 0, RATE, STEPS)
        cells.run(f"longer {MODEL} {PATTERN} {arm}", make)


def section(cells):
    """Perplexity and gap closed after both lengths."""
    base, start = (
        cells.found.get(name)
        for name in (
            f"retraining {MODEL} original",
            f"retraining {MODEL} {PATTERN} SparseGPT seed 0",
        )
    )
    if not (base and start):
        return [NOT_RUN]
    whole, pruned = (math.exp(cell["heldout"]) for cell in (base, start))
    rows = []
    for arm in ARMS:
        short = key(retraining.prefix(MODEL, PATTERN, arm), RATE, 0)
        found = [cells.found.get(name) for name in (short, f"longer {MODEL} {PATTERN} {arm}")]
        values = [math.exp(cell["heldout"]) if cell else None for cell in found]
        closed = [v and 100 * (pruned - v) / (pruned - whole) for v in values]
        shown = [
            [f"{v:.2f}", f"{c:.0f}"] if v else [NOT_RUN] * 2
            for v, c in zip(values, closed, strict=False)
        ]
        rows.append([arm, *shown[0], *shown[1]])
    header = ["arm", "100 steps", "gap closed %", f"{STEPS} steps", "gap closed %"]
    return [f"Original {whole:.2f}, SparseGPT {pruned:.2f}.", table(header, rows)]
