"""How close do 4 bits come to the float model with more steps?

Quantized distillation of stories260K as in the experiment above, group grid and learned steps, with
four times as many steps, beside the float model that was trained on for as long. Three rates each,
seed 0. About 5 minutes a cell.
"""

import math
from functools import partial

import lab
from cells import table
from quantization_trained import cell, prefix
from sweep import NOT_RUN, best_rate, outcomes, sweep

TITLE = "Longer training at 4 bits"
MODELS = (lab.STORIES,)
BITS, STEPS, SIZE = 4, 2000, "same size"
RATES = (1e-4, 3e-4, 1e-3)
ARMS = {"QD, learned steps": BITS, "float, trained": None, "QD, group": BITS}


def name(arm):
    return f"longer {STEPS} {prefix(lab.STORIES, SIZE, arm, ARMS[arm])}"


def run(cells, model, seeds):
    """Every arm over its rates."""
    for arm, bits in ARMS.items():
        make = partial(cell, model, SIZE, arm, bits, steps=STEPS)
        sweep(cells, name(arm), make, seeds[:1], RATES)


def section(cells):
    """Nats after both lengths, and perplexity to that of the float original."""
    base = cells.found.get(prefix(lab.STORIES, SIZE, "float", None))
    rows = []
    for arm, bits in ARMS.items():
        short = outcomes(cells, prefix(lab.STORIES, SIZE, arm, bits), seeds=[0])
        long, rate = outcomes(cells, name(arm), seeds=[0]), best_rate(cells, name(arm))
        label = f"{bits} bits, {arm}" if bits else arm
        shown = [part for found in (short, long) for part in _shown(found, base)]
        rows.append([label, *shown, f"{rate:g}" if rate else NOT_RUN])
    header = ["arm", "500 steps", "to float", f"{STEPS:,} steps", "to float", "rate"]
    return [table(header, rows)]


def _shown(found, base):
    if not (found and base):
        return [NOT_RUN, ""]
    more = math.expm1(found[0] - base["heldout"])
    return [f"{found[0]:.3f}", f"{100 * more:+.1f} %"]
