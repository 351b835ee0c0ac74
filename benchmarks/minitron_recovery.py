"""Recovery: the same pruned shape, trained with KL, with cross entropy, with both, or from scratch.

Half of the parameters stay. All arms take the same batches, 200 steps (novels-llama: 100) of 8 rows
of 128 tokens, and the same grid of three learning rates (0.001 to 0.01; for the file as it is,
0.003 to 0.03). Seeds choose calibration text, batches and random weights. 12 to 45 seconds a cell
on stories260K.

The text matters. The file of stories holds markers between stories that stories260K never saw, and
it is split into paragraphs; *whole stories* is the same text without markers, a story at a time,
as the model was trained. Cross entropy learns the markers, KL copies a teacher that does not know
them.
"""

from functools import partial

import lab
from cells import table
from sweep import NOT_RUN, RATES, against, best_rate, edges, mean, outcomes, shown, sweep, tried

TITLE = "Recovery after pruning to half"
PAPER = """\
The paper finds KL alone ahead of KL with cross entropy and far ahead of random weights."""
STEPS, SHARE = 200, 0.5
RATES_OF = {"stories260K": (3e-3, 1e-2, 3e-2)}
SHORTER = {"novels-llama": 100}  # its steps take ten times as long
FACTS = ("original", "before")
ARMS = ("pruned, KL", "pruned, CE", "pruned, CE + KL", "random, CE", "random, KL")


def steps_of(model):
    return SHORTER.get(model, STEPS)


def prefix(model, arm, steps=None):
    return f"recovery {model} {arm} steps {steps or steps_of(model)}"


def cell(model, arm, steps, seed, lr):
    """Loss after training; the zero-shot loss and the original's beside it."""
    start, objective = arm.split(", ")
    student = lab.pruned(model, seed, parameters=SHARE)
    if start == "random":
        student = lab.random_start(student, seed)
    held = lab.rows(model, "heldout")
    facts = {
        "original": lab.loss(lab.original(model), held),
        "before": lab.loss(student, held),
        "sizes": student.sizes,
    }
    return facts | lab.trained(model, student, objective, seed, steps, lr) | {"lr": lr}


def run(cells, model, seeds):
    """Every arm, over the grid and the seeds."""
    for arm in ARMS:
        make = partial(cell, model, arm, steps_of(model))
        sweep(cells, prefix(model, arm), make, seeds, RATES_OF.get(model, RATES))


def section(cells):
    """A table for every model, and what the arms say of each other."""
    blocks = []
    for model in lab.MODELS:
        found = {arm: outcomes(cells, prefix(model, arm)) for arm in ARMS}
        rows = [_row(cells, model, arm, values) for arm, values in found.items()]
        header = ["arm", "best rate", "as pruned", "nats per token", "over seeds", "seeds"]
        blocks += [f"### {model}", table(header, rows), *_findings(cells, model, found)]
    return [*blocks, PAPER, *_texts(cells)]


def _texts(cells):
    """KL against cross entropy on text that the teacher knows and on text that it does not."""
    said = []
    for model in ("stories260K", lab.STORIES):
        kl, ce, whole = (
            outcomes(cells, prefix(model, arm), what=what)
            for arm, what in ((ARMS[0], "heldout"), (ARMS[1], "heldout"), (ARMS[0], "original"))
        )
        if kl and ce:
            apart = mean(kl) - mean(ce)
            said.append(f"{model}: the teacher has {mean(whole):.3f} nats, KL - CE {apart:+.3f}")
    return [f"By text: {'; '.join(said)}."] if said else []


def _row(cells, model, arm, values):
    rate = best_rate(cells, prefix(model, arm))
    before = outcomes(cells, prefix(model, arm), what="before")
    start = f"{mean(before):.3f}" if before else NOT_RUN
    return [arm, f"{rate:g}" if rate else NOT_RUN, start, *shown(values)]


def _findings(cells, model, found):
    best = found[ARMS[0]]
    if not best:
        return []
    whole, start = (mean(outcomes(cells, prefix(model, ARMS[0]), what=w)) for w in FACTS)
    back = 100 * (start - mean(best)) / (start - whole)
    lines = [
        f"The original has {whole:.3f} nats. Of what pruning costs, *{ARMS[0]}* wins back "
        f"{back:.0f} %."
    ]
    lines += [
        f"It ends {against(best, values)} *{arm}* ({mean(best) - mean(values):+.3f} nats)."
        for arm, values in found.items()
        if values and arm != ARMS[0]
    ]
    names = {arm: prefix(model, arm) for arm in ARMS if found[arm]}
    grids = {arm: (best_rate(cells, name), tried(cells, name)) for arm, name in names.items()}
    lines += edges(grids)
    return [" ".join(lines)]
