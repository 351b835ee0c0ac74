"""Search: after how many steps of retraining is the order of candidate shapes settled?

Six shapes of stories260K with half of its parameters, within 1.5 %, are retrained with KL for
0 to 400 steps and for the final 600, each length with a schedule of its own; steps are of 8 rows
of 64 tokens. The order of the losses at every length is compared with the final order. 3 to 40
seconds a cell.
"""

import itertools
from functools import partial

import lab
from cells import table
from ranks import kendall, spearman
from sweep import NOT_RUN, mean, shown

TITLE = "Search: when is the order of shapes settled?"
SHAPES = {
    lab.STORIES: [
        {"layers": 5, "hidden": 64, "heads": 4, "mlp": 56},
        {"layers": 5, "hidden": 48, "heads": 8, "mlp": 80},
        {"layers": 5, "hidden": 32, "heads": 8, "mlp": 168},
        {"layers": 4, "hidden": 64, "heads": 4, "mlp": 80},
        {"layers": 4, "hidden": 48, "heads": 8, "mlp": 116},
        {"layers": 3, "hidden": 64, "heads": 8, "mlp": 100},
    ]
}
LADDER, FINAL = (0, 50, 100, 200, 400), 600
STEPS = (*LADDER, FINAL)
RATE, ROW = 3e-3, 64  # tokens of a training row


def label(sizes):
    return " ".join(f"{axis} {size}" for axis, size in sizes.items())


def key(model, sizes, steps, seed):
    return f"search {model} {label(sizes)} steps {steps} seed {seed}"


def cell(model, sizes, steps, seed):
    """Losses after `steps` of retraining."""
    student = lab.pruned(model, seed, sizes=sizes)
    if steps:
        return lab.trained(model, student, "KL", seed, steps, RATE, ROW)
    return {s: lab.loss(student, lab.rows(model, s)) for s in ("validation", "heldout")}


def run(cells, model, seeds):
    """Short runs first."""
    shapes = SHAPES.get(model, [])
    for seed, steps, sizes in itertools.product(seeds, (*LADDER, FINAL), shapes):
        cells.run(key(model, sizes, steps, seed), partial(cell, model, sizes, steps, seed))


def section(cells):
    """Losses of the shapes, and how alike the order at every length is to the final one."""
    blocks = []
    for model, shapes in SHAPES.items():
        seeds = [s for s in range(10) if all(_losses(cells, model, FINAL, s))]
        found = {steps: [_losses(cells, model, steps, s) for s in seeds] for steps in STEPS}
        header = ["shape", *(f"{steps} steps" for steps in STEPS)]
        rows = [
            [label(sizes), *(_mean_of(column, i) for column in found.values())]
            for i, sizes in enumerate(shapes)
        ]
        blocks += [f"### {model}, mean over {len(seeds)} seeds", table(header, rows)]
        blocks += _orders(found) if seeds else []
    return blocks


def _losses(cells, model, steps, seed):
    """Validation losses of all shapes: a search ranks by these."""
    found = [cells.found.get(key(model, sizes, steps, seed)) for sizes in SHAPES[model]]
    return [c and c["validation"] for c in found]


def _mean_of(column, i):
    values = [losses[i] for losses in column if losses[i] is not None]
    return f"{mean(values):.3f}" if values else NOT_RUN


def _orders(found):
    """Ranks at every length against those after the final one, seed by seed."""
    rows = []
    for steps in LADDER:
        pairs = [p for p in zip(found[steps], found[FINAL], strict=True) if None not in p[0]]
        alike = [[measure(*pair) for pair in pairs] for measure in (spearman, kendall)]
        best = sum(_first(early) == _first(late) for early, late in pairs)
        # what a search that stops here gives away in the end
        lost = [late[_first(early)] - min(late) for early, late in pairs]
        orders = [shown(v, 2)[i] for v in alike for i in (0, 1)]
        rows.append([str(steps), *orders, str(best), *_worst(lost)])
    header = ["steps", "Spearman", "over seeds", "Kendall", "over seeds", "winner is the final one"]
    said = (
        "*Winner is the final one* counts seeds in which the best shape then is the best after "
        f"{FINAL} steps; *given away* is how much worse than the best it is in the end."
    )
    return [table([*header, "given away, nats", "at most"], rows), said]


def _first(losses):
    return min(range(len(losses)), key=losses.__getitem__)


def _worst(lost):
    return [f"{mean(lost):.3f}", f"{max(lost):.3f}"] if lost else [NOT_RUN, NOT_RUN]
