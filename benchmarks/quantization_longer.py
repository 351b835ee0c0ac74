"""How close do 4 bits come to the float model with more steps?

Quantized distillation as in the experiment above, four times as many steps at the rate that was
best there (seed 0), beside the float model that was trained on for as long at its own. Learned
steps and the group grid. 5 minutes a cell of stories260K, 15 of novels-llama.
"""

import math
from functools import partial

from cells import table
from quantization_trained import LEARNED, MODELS, cell, prefix
from sweep import NOT_RUN, best_rate, outcomes

TITLE = "Longer training at 4 bits"
SIZE, TIMES = "same size", 4
ARMS = {LEARNED: 4, "float, trained": None, "QD, group": 4}


def name(model, arm):
    return f"longer {prefix(model, SIZE, arm, ARMS[arm])}"


def run(cells, model, seeds):
    """Every arm whose best rate is known, once."""
    for arm, bits in ARMS.items():
        lr = best_rate(cells, prefix(model, SIZE, arm, bits))
        if lr is None:
            print(f"{arm}: run the experiment 'trained' first")
            continue
        make = partial(cell, model, SIZE, arm, bits, 0, lr, TIMES * MODELS[model][1])
        cells.run(name(model, arm), make)


def section(cells):
    """Nats after both lengths, and perplexity to that of the float original."""
    blocks = []
    for model, (_, steps) in MODELS.items():
        base = cells.found.get(prefix(model, SIZE, "float", None))
        rows = []
        for arm, bits in ARMS.items():
            short = outcomes(cells, prefix(model, SIZE, arm, bits), seeds=[0])
            long = cells.found.get(name(model, arm))
            losses = [short[0] if short else None, long["heldout"] if long else None]
            label = f"{bits} bits, {arm}" if bits else arm
            rows.append([label, *(part for loss in losses for part in _shown(loss, base))])
        header = ["arm", f"{steps} steps", "to float", f"{TIMES * steps:,} steps", "to float"]
        blocks += [f"### {model}", table(header, rows)]
    return blocks


def _shown(loss, base):
    if loss is None or base is None:
        return [NOT_RUN, ""]
    return [f"{loss:.3f}", f"{100 * math.expm1(loss - base['heldout']):+.2f} %"]
