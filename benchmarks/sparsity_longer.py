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
    """Perplexity and gap closed after both lengths, to the dense model of the same length."""
    starts = (f"retraining {MODEL} original", f"retraining {MODEL} {PATTERN} SparseGPT seed 0")
    base, start = (cells.found.get(name) for name in starts)
    if not (base and start):
        return [NOT_RUN]
    whole, pruned = (math.exp(cell["heldout"]) for cell in (base, start))
    found = {arm: _perplexities(cells, arm) for arm in ARMS}
    rows = []
    for arm, values in found.items():
        row = [arm]
        for value, dense in zip(values, found["dense, trained"], strict=True):
            ends = (whole, dense)
            closed = [value and end and 100 * (pruned - value) / (pruned - end) for end in ends]
            row += [
                f"{value:.2f}" if value else NOT_RUN,
                *(f"{c:.0f}" if c else "" for c in closed),
            ]
        rows.append(row)
    part = ["gap closed %", "to trained dense %"]
    header = ["arm", "100 steps", *part, f"{STEPS} steps", *part]
    return [f"Original {whole:.2f}, SparseGPT {pruned:.2f}.", table(header, rows)]


def _perplexities(cells, arm):
    """After 100 steps and after STEPS; None where it was not run."""
    short = key(retraining.prefix(MODEL, PATTERN, arm), RATE, 0)
    cells = [cells.found.get(name) for name in (short, f"longer {MODEL} {PATTERN} {arm}")]
    return [math.exp(cell["heldout"]) if cell else None for cell in cells]
