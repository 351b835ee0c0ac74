"""How many tokens training from scratch needs for what a pruned model has after few.

Random weights in the shape of the recovery experiment get 5 to 20 times its tokens, with cross
entropy, at the rate that was best for them and with the schedule stretched to the length. The
text is short: 20 times are several epochs, so this is what a user with that text would see, not a
law. 2 to 6 minutes a cell on stories260K.
"""

from functools import partial

import lab
from cells import table
from minitron_recovery import ARMS, STEPS, cell, prefix
from sweep import best_rate, mean, outcomes, shown

TITLE = "Tokens that training from scratch needs"
ARM, FACTORS = "random, CE", (5, 10, 20)


def key(model, factor, seed):
    return f"{prefix(model, ARM, factor * STEPS)} seed {seed}"


def run(cells, model, seeds):
    """Shorter runs first."""
    lr = best_rate(cells, prefix(model, ARM))
    for factor in FACTORS:
        for seed in seeds:
            make = partial(cell, model, ARM, factor * STEPS, seed, lr)
            cells.run(key(model, factor, seed), make)


def section(cells):
    """Loss by tokens beside that of the pruned model."""
    blocks = []
    for model in lab.MODELS:
        target = outcomes(cells, prefix(model, ARMS[0]))
        found = {1: outcomes(cells, prefix(model, ARM))}
        found |= {f: _values(cells, model, f) for f in FACTORS}
        rows = [[f"{ARMS[0]}, 1 x", *shown(target)]]
        rows += [[f"{ARM}, {f} x", *shown(values)] for f, values in found.items()]
        header = ["arm, tokens", "nats per token", "over seeds", "seeds"]
        blocks += [f"### {model}", table(header, rows), *_findings(target, found)]
    return blocks


def _values(cells, model, factor):
    found = [cells.found.get(key(model, factor, seed)) for seed in range(10)]
    return [c["heldout"] for c in found if c]


def _findings(target, found):
    measured = [f for f, values in found.items() if values]
    if not target or len(measured) < 2:
        return []
    reached = [f for f in measured if mean(found[f]) <= mean(target)]
    if reached:
        first = min(reached)
        short = max([f for f in measured if f < first], default=0)
        return [
            f"Training from scratch reaches the pruned model between {short} x and {first} x its "
            f"tokens ({mean(found[first]):.3f} against {mean(target):.3f})."
        ]
    last = max(measured)
    gap = mean(found[last]) - mean(target)
    return [f"At {last} x the tokens training from scratch is still {gap:.3f} nats above."]
