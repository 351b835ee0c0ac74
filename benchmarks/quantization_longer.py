"""How close do 4 and 2 bits come to the float model with more steps?

Quantized distillation as in the experiment above, 4 or 16 times as many steps at the rate that was
best there (seed 0), beside the float model that was trained on for as long at its own. Learned
steps and the group grid. *Recovered* is as above, of perplexity. 5 minutes a cell of stories260K,
10 of novels-llama; 16 times the steps take four times as long.
"""

import math
from functools import partial

from cells import table
from quantization_trained import LEARNED, MODELS, cell, prefix, recovered
from sweep import NOT_RUN, best_rate, outcomes

TITLE = "Longer training"
SIZE = "same size"
ARMS = {  # (arm, bits): how many times the steps
    (LEARNED, 4): (4,),
    (LEARNED, 2): (4, 16),
    ("float, trained", None): (4,),
    ("QD, group", 4): (4,),
}
TIMES = (4, 16)


def name(model, arm, bits, times):
    return ("longer" if times == 4 else f"longer x{times}") + f" {prefix(model, SIZE, arm, bits)}"


def run(cells, model, seeds):
    """Every arm whose best rate is known, once."""
    for (arm, bits), lengths in ARMS.items():
        lr = best_rate(cells, prefix(model, SIZE, arm, bits))
        if lr is None:
            print(f"{arm}: run the experiment 'trained' first")
            continue
        for times in lengths:
            make = partial(cell, model, SIZE, arm, bits, 0, lr, times * MODELS[model][1])
            cells.run(name(model, arm, bits, times), make)


def section(cells):
    """Nats after all lengths, and perplexity to that of the float original."""
    blocks = []
    for model, (_, steps) in MODELS.items():
        rows = []
        for (arm, bits), lengths in ARMS.items():
            short = outcomes(cells, prefix(model, SIZE, arm, bits), seeds=[0])
            row = _shown(cells, model, bits, short[0] if short else None)
            for times in TIMES:
                if times not in lengths:
                    row += [""] * 3
                    continue
                found = cells.found.get(name(model, arm, bits, times))
                row += _shown(cells, model, bits, found["heldout"] if found else None)
            rows.append([f"{bits} bits, {arm}" if bits else arm, *row])
        header = ["arm"]
        for times in (1, *TIMES):
            header += [f"{times * steps:,} steps", "to float", "recovered %"]
        blocks += [f"### {model}", table(header, rows)]
    return blocks


def _shown(cells, model, bits, loss):
    base = cells.found.get(prefix(model, SIZE, "float", None))
    if loss is None or base is None:
        return [NOT_RUN, "", ""]
    back = recovered(cells, model, SIZE, LEARNED, bits, loss) if bits else []
    above = f"{100 * math.expm1(loss - base['heldout']):+.2f} %"
    return [f"{loss:.3f}", above, f"{back[0]:.0f}" if back else ""]
