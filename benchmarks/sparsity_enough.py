"""SquareHead when teacher and students train until they stop gaining: what does sparsity cost then?

novels-llama on grade-school problems as in the experiment before, whose teacher stops after 100
steps, far from its best: there sparse students gain more from training on than they lose. Here
all arms train for at most 400 steps at that experiment's best rate (0.003, seed 0), look at
validation rows every 50, end early when two looks in a row were not the best, and keep the best
weights. *Dense, longer* is the teacher trained so once more. The interval is of the difference to
the teacher, problem by problem (bootstrap, 95 %). 8 to 16 minutes a cell.
"""

from dataclasses import replace
from functools import partial

from cells import table
from sparsity_squarehead import LOSSES, Arms, arm_of, row
from sweep import NOT_RUN

TITLE = "SquareHead with early stopping"
MODEL, RATE = "novels-llama", 3e-3
MODELS = (MODEL,)
STEPS, LOOKS = 400, {"validate_every": 50, "patience": 2}
SPARSITIES = (0.75, 0.5, 0.8)  # most important first


class Enough(Arms):
    """Arms that train until they stop gaining."""

    experiment = "enough"

    def options(self, lr, steps=STEPS):
        return replace(super().options(lr, STEPS), **LOOKS)

    def teacher_name(self, lr):
        return f"{self.model}-early-{STEPS}-{lr:g}"

    def best_rate(self, arm):
        return RATE


def run(cells, model, seeds):
    """Every arm once."""
    arms = Enough(cells, model)
    cells.run(arms.key("dense", RATE), partial(arms.dense, RATE))
    for sparsity in SPARSITIES:
        for loss in LOSSES:
            make = partial(arms.sparse, loss, sparsity, RATE, 0)
            cells.run(arms.key(arm_of(loss, sparsity), RATE), make)
        cells.run(arms.key("dense, longer", RATE), partial(arms.longer, RATE, 0))


def section(cells):
    """Loss of every arm, and what it lost to the teacher."""
    arms = Enough(cells, MODEL)
    teacher = cells.found.get(arms.key("dense", RATE))
    if not teacher:
        return [NOT_RUN]
    sparse = [arm_of(loss, sparsity) for sparsity in sorted(SPARSITIES) for loss in LOSSES]
    rows = [_row(arms, arm, teacher) for arm in ("dense", "dense, longer", *sparse)]
    header = ["arm", arms.task.LOSS, "minus dense", "95 % interval", "best after steps"]
    return [table(header, rows)]


def _row(arms, arm, teacher):
    cell = arms.cells.found.get(arms.key(arm, RATE))
    steps = str(cell["training"]["best_step"]) if cell and "training" in cell else ""
    _, _, loss, _, apart, ends, _ = row(arms, arm, RATE, teacher)
    return [arm, loss, apart, ends, steps]
