"""Search: after how many steps of retraining is the order of candidate shapes settled?

Six shapes of stories260K with half of its parameters, within 1.5 %, are retrained with KL for
0 to 200 steps and for the final 600, each length with a schedule of its own; steps are of 8 rows
of 64 tokens. The order of the losses at every length is compared with the final order. 3 to 40
seconds a cell.
"""

import itertools
from functools import partial

import lab
from cells import table
from ranks import kendall, spearman
from sweep import NOT_RUN

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
LADDER, FINAL = (0, 50, 100, 200), 600
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
        losses = {steps: _losses(cells, model, steps) for steps in (*LADDER, FINAL)}
        rows = [
            [label(sizes), *(NOT_RUN if loss is None else f"{loss:.3f}" for loss in column)]
            for sizes, *column in zip(shapes, *losses.values(), strict=True)
        ]
        blocks += [f"### {model}", table(["shape", *(f"{n} steps" for n in losses)], rows)]
        blocks += _orders(losses)
    return blocks


def _losses(cells, model, steps):
    """Validation losses of all shapes with seed 0: a search ranks by these."""
    found = [cells.found.get(key(model, sizes, steps, 0)) for sizes in SHAPES[model]]
    return [c and c["validation"] for c in found]


def _orders(losses):
    final = losses[FINAL]
    if None in final:
        return [f"Agreement with the final order: {NOT_RUN}."]
    rows = [
        [str(n), f"{spearman(losses[n], final):.2f}", f"{kendall(losses[n], final):.2f}"]
        for n in LADDER
        if None not in losses[n]
    ]
    best = min(range(len(final)), key=final.__getitem__)
    first = [n for n in LADDER if None not in losses[n] and min(losses[n]) == losses[n][best]]
    when = f"from {first[0]} steps" if first else "at no shorter length"
    return [
        table(["steps", "Spearman", "Kendall"], rows),
        f"The shape that is best after {FINAL} steps is first {when}. One seed.",
    ]
