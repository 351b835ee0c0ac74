"""How many tokens training from scratch needs for what a pruned model has after few.

Both start from the shape of the recovery experiment, at the rate that was best for them there, with
the schedule stretched to the length. Pruned models learn with KL, random weights with cross
entropy. 1 x is the recovery experiment's 200 steps. The text is short: 50 times are many epochs, so
this is what a user with that text would see, not a law. 1 to 15 minutes a cell on stories260K.
"""

from functools import partial

import lab
from cells import table
from minitron_recovery import ARMS, STEPS, cell, prefix
from sweep import best_rate, mean, outcomes, shown

TITLE = "Tokens that training from scratch needs"
PRUNED, RANDOM = ARMS[0], "random, CE"
FACTORS = {PRUNED: (1, 5), RANDOM: (1, 5, 10, 20, 50)}
SEVERAL = 20  # longer runs: one seed


def key(model, arm, factor, seed):
    return f"{prefix(model, arm, factor * STEPS)} seed {seed}"


def run(cells, model, seeds):
    """Shorter runs first."""
    for factor in sorted({f for factors in FACTORS.values() for f in factors if f > 1}):
        for arm in (arm for arm in FACTORS if factor in FACTORS[arm]):
            lr = best_rate(cells, prefix(model, arm))
            for seed in seeds if factor <= SEVERAL else seeds[:1]:
                make = partial(cell, model, arm, factor * STEPS, seed, lr)
                cells.run(key(model, arm, factor, seed), make)


def section(cells):
    """Loss by tokens, and at which length random weights reach a pruned model."""
    blocks = []
    for model in ("stories260K", lab.STORIES):
        found = {arm: {f: _values(cells, model, arm, f) for f in FACTORS[arm]} for arm in FACTORS}
        rows = [
            [f"{arm}, {factor} x", *shown(values)]
            for arm, lengths in found.items()
            for factor, values in lengths.items()
        ]
        header = ["arm, tokens", "nats per token", "over seeds", "seeds"]
        blocks += [f"### {model}", table(header, rows)]
        blocks += [_reached(f, v, found[RANDOM]) for f, v in found[PRUNED].items() if v]
    return [block for block in blocks if block]


def _values(cells, model, arm, factor):
    if factor == 1:
        return outcomes(cells, prefix(model, arm))
    found = [cells.found.get(key(model, arm, factor, seed)) for seed in range(10)]
    return [c["heldout"] for c in found if c]


def _reached(factor, target, lengths):
    """When training from scratch is as good as a model pruned and trained for `factor` x."""
    measured = [f for f, values in lengths.items() if values]
    if max(measured, default=0) <= factor:
        return ""
    aim = f"{PRUNED}, {factor} x ({mean(target):.3f})"
    reached = [f for f in measured if mean(lengths[f]) <= mean(target)]
    if reached:
        first = min(reached)
        short = max([f for f in measured if f < first], default=0)
        return (
            f"Training from scratch reaches *{aim}* between {short} x and {first} x: with "
            f"{short / factor:g} to {first / factor:g} times its tokens."
        )
    last = max(measured)
    return (
        f"At {last} x, {last / factor:g} times its tokens, training from scratch is still "
        f"{mean(lengths[last]) - mean(target):.3f} nats above *{aim}*; its best is "
        f"{min(mean(lengths[f]) for f in measured):.3f}."
    )
