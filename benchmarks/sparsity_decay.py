"""AST's pull on masked weights: how strong, and where in the update?

150 steps of *AST, 2:4* as in the experiment on retraining, at the rate 0.001 and with seed 0. The
paper's pull is 0.0001, on a model five hundred times as large and over 40,000 steps. The other
experiments take what does best here on validation text. A flip rate is the share of mask entries
that change between two choices, ten steps apart. 15 seconds a cell.
"""

from functools import partial

import lab
from cells import table
from sweep import NOT_RUN

from compressor.prune import ast
from compressor.training.options import Train

TITLE = "How strong AST's pull must be"
STEPS, RATE = 150, 1e-3
DECAYS, FORMS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), ("denominator", "gradient")
MODELS = (lab.STORIES,)


def cell(model, decay, form):
    """Losses and flip rates of one setting."""
    options = Train(
        **{"steps": STEPS, "batch": lab.BATCH, "length": lab.LENGTH, "lr": RATE},
        **{"precision": "float32", "snapshot_seconds": 1e6},
    )
    student = lab.original(model)
    with lab.workbench(model, 0) as work:
        ast.run(student, ast.Options(decay=decay, decay_form=form, train=options), work)
    losses = {s: lab.loss(student, lab.rows(model, s)) for s in ("validation", "heldout")}
    return losses | {"flip_rate": student.notes["flip_rate"]}


def key(model, decay, form):
    return f"decay {model} {form} {decay:g}"


def run(cells, model, seeds):
    """Every setting."""
    for form in FORMS:
        for decay in DECAYS:
            cells.run(key(model, decay, form), partial(cell, model, decay, form))


def section(cells):
    """A row for every setting."""
    rows = []
    for form in FORMS:
        for decay in DECAYS:
            found = cells.found.get(key(MODELS[0], decay, form))
            rows.append([form, f"{decay:g}", *(_row(found) if found else [NOT_RUN] * 4)])
    header = ["form", "pull", "validation", "held out", "highest flip rate %", "last flip rate %"]
    return [table(header, rows)]


def _row(found):
    rates = [100 * share for _, share in found["flip_rate"]]
    losses = [f"{found[split]:.3f}" for split in ("validation", "heldout")]
    return [*losses, f"{max(rates):.2f}", f"{rates[-1]:.2f}"]
