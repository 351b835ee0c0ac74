"""SquareHead on a task: which loss recovers a sparse finetuned model, and up to which sparsity?

A model is finetuned with cross entropy on the task: the teacher. SparseGPT prunes the teacher in
one shot and the student is trained with the masks held: with cross entropy alone, with KL as well
(weight 1, temperature 1), or with SquareHead as well (weight 1). *Dense, longer* is the teacher
trained again on the same batches with cross entropy. All train for 100 steps with batches and rates
that a task's file names (benchmarks/task_*.py), a teacher for as many steps as it names, which are
more where the model has random weights before. The rate of a loss is the best on
validation rows at 75 % with seed 0. Loss is that of held-out rows; the interval is of the
difference to the teacher, row by row (bootstrap, 95 %). *Trivial* needs no model; a task's file
says what it is. 1 to 4 minutes a cell, 6 for a teacher that begins with random weights.
"""

import importlib
import random
from functools import partial

import lab
from cells import table
from sweep import NOT_RUN, edges, mean

from compressor.distill import ce
from compressor.distill.runner import run as train
from compressor.model.checkpoint import load_directory
from compressor.model.saving import save
from compressor.prune import squarehead
from compressor.training.options import Train

TITLE = "SquareHead on tasks"
MODELS = {
    **{"novels-llama": "task_problems", "all-MiniLM-L6-v2": "task_reviews"},
    **{"small-t5": "task_capitals", "small-whisper": "task_spoken"},
}
STEPS, SAMPLES, TUNED = 100, 128, 0.75
SPARSITIES = (0.75, 0.5, 0.9, 0.6, 0.8, 0.7)  # most important first
LOSSES = {
    "CE": {"squarehead": 0.0},
    "CE + KL": {"squarehead": 0.0, "kl": 1.0},
    "CE + SquareHead": {},
}


class Arms:
    """The arms of one task."""

    experiment = "squarehead"

    def __init__(self, cells, model):
        self.cells, self.model = cells, model
        self.task = importlib.import_module(MODELS[model])

    def options(self, lr, steps=STEPS):
        return Train(
            **{"steps": steps, "batch": self.task.BATCH, "length": self.task.LENGTH, "lr": lr},
            **{"precision": "float32", "snapshot_seconds": 1e6},
        )

    def work(self, teacher, seed):
        task = self.task
        return lab.surroundings(task.corpus(), teacher, seed, task.TASK, "train", task.READING)

    def finetuned(self, model, lr, seed, steps=STEPS):
        """`model` trained with cross entropy."""
        options = ce.Options(train=self.options(lr, steps))
        with self.work(self.task.start, seed) as work:
            train(model, ce.objective(options, model, None), options, work)
        return model

    def taught(self, lr):
        """The model finetuned on the task: made once, and kept in the temporary folder."""
        task = self.task

        def make(folder):
            save(self.finetuned(task.start(), lr, 0, task.TEACHER_STEPS), folder, task.parent())

        return load_directory(lab.kept(self.teacher_name(lr), make))

    def teacher_name(self, lr):
        return f"{self.model}-{self.task.TEACHER_STEPS}-{lr:g}"

    def teacher(self):
        model = self.taught(self.best_rate("dense"))
        model.module.requires_grad_(False)
        return model

    def dense(self, lr):
        return self.measured(self.taught(lr), lr)

    def longer(self, lr, seed):
        return self.measured(self.finetuned(self.teacher(), lr, seed + 1), lr)

    def sparse(self, loss, sparsity, lr, seed):
        """The teacher pruned and trained again."""
        student, length = self.teacher(), self.task.LENGTH
        options = squarehead.Options(
            **{"sparsity": sparsity, "samples": SAMPLES, "length": length},
            **LOSSES[loss],
            train=self.options(lr),
        )
        with self.work(self.teacher, seed + 1) as work:
            squarehead.run(student, options, work)
        return self.measured(student, lr)

    def measured(self, model, lr):
        rows = self.task.losses(model, "heldout")
        validation = per_unit(self.task.losses(model, "validation"))
        facts = {"lr": lr, "validation": validation, "heldout": per_unit(rows), "rows": rows}
        trained = {k: v for k, v in model.notes.items() if k == "training"}
        return facts | trained | self.task.more(model)

    def key(self, arm, lr, seed=0):
        return f"{self.experiment} {self.model} {arm} lr {lr:g} seed {seed}"

    def rates(self, arm):
        return self.task.TEACHER_RATES if arm == "dense" else self.task.RATES

    def best_rate(self, arm):
        """The rate of the lowest validation loss; None while less than a grid was run."""
        names = [self.key(arm, lr) for lr in self.rates(arm)]
        found = [self.cells.found[name] for name in names if name in self.cells.found]
        if len(found) < len(names):
            return None
        return min(found, key=lambda cell: cell["validation"])["lr"]

    def sweep(self, arm, make):
        for lr in self.rates(arm):
            self.cells.run(self.key(arm, lr), partial(make, lr))

    def found(self, arm, lr):
        """Cells of an arm over seeds."""
        cells = [self.cells.found.get(self.key(arm, lr, seed)) for seed in range(10)] if lr else []
        return [cell for cell in cells if cell]


def per_unit(rows):
    """Loss of a list of (loss, units)."""
    return sum(loss for loss, _ in rows) / sum(count for _, count in rows)


def arm_of(loss, sparsity):
    return f"{sparsity:g} {loss}"


def run(cells, model, seeds):
    """The teacher, then the grid at one sparsity, then the other sparsities."""
    arms = Arms(cells, model)
    arms.sweep("dense", arms.dense)
    arms.sweep("dense, longer", lambda lr: arms.longer(lr, 0))
    for loss in LOSSES:
        arms.sweep(arm_of(loss, TUNED), lambda lr, loss=loss: arms.sparse(loss, TUNED, lr, 0))
    for seed in seeds:
        for sparsity in SPARSITIES:
            for loss in LOSSES:
                lr = arms.best_rate(arm_of(loss, TUNED))
                name = arms.key(arm_of(loss, sparsity), lr, seed)
                cells.run(name, partial(arms.sparse, loss, sparsity, lr, seed))


def section(cells):
    """A table for every task."""
    blocks = []
    for model in MODELS:
        arms = Arms(cells, model)
        blocks.append(f"### {arms.task.TITLE}")
        base = arms.best_rate("dense")
        blocks += _table(arms, arms.found("dense", base)[0]) if base else [NOT_RUN]
    return blocks


def _table(arms, teacher):
    rows = [row(arms, arm, arms.best_rate(arm), teacher) for arm in ("dense", "dense, longer")]
    if "trivial" in teacher:
        rows.insert(0, ["trivial", *[""] * 5, f"{teacher['trivial']:.3f}"])
    for sparsity in sorted(SPARSITIES):
        for loss in LOSSES:
            rate = arms.best_rate(arm_of(loss, TUNED))
            rows.append(row(arms, arm_of(loss, sparsity), rate, teacher))
    header = ["arm", "rate", arms.task.LOSS, "seeds", "minus dense", "95 % interval", "accuracy"]
    tuned = ["dense, longer", *(arm_of(loss, TUNED) for loss in LOSSES)]
    grids = {arm: (arms.best_rate(arm), arms.rates(arm)) for arm in tuned}
    return [table(header, rows), *edges(grids)]


def row(arms, arm, lr, teacher):
    found = arms.found(arm, lr)
    if not found:
        return [arm, f"{lr:g}" if lr else NOT_RUN, NOT_RUN, "0", NOT_RUN, NOT_RUN, ""]
    value = mean([cell["heldout"] for cell in found])
    low, high = interval(found, teacher)
    apart = f"{value - teacher['heldout']:+.4f}"
    right = [cell["accuracy"] for cell in found if "accuracy" in cell]
    accuracy = f"{mean(right):.3f}" if right else ""
    ends = f"{low:+.4f} to {high:+.4f}"
    return [arm, f"{lr:g}", f"{value:.4f}", str(len(found)), apart, ends, accuracy]


def interval(found, teacher, times=2000):
    """95 % of resampled held-out rows, of the difference per unit; the mean over seeds."""
    draw, own = random.Random(0), teacher["rows"]
    apart = [mean([c["rows"][i][0] for c in found]) - own[i][0] for i in range(len(own))]
    differences = []
    for _ in range(times):
        chosen = draw.choices(range(len(own)), k=len(own))
        differences.append(sum(apart[i] for i in chosen) / sum(own[i][1] for i in chosen))
    differences.sort()
    return differences[int(0.025 * times)], differences[int(0.975 * times) - 1]
