"""Width against depth against both, at equal parameters.

All three shapes of stories260K have within 1 % of the parameters of the depth-pruned one. Every
shape is measured as pruned and after 200 steps of KL on the same batches, all at the rate that was
best for KL in the recovery experiment. 12 to 40 seconds a cell.
"""

from functools import partial

import lab
from cells import table
from sweep import against, key, mean, shown

TITLE = "Width, depth, or both"
STEPS, RATE = 200, 3e-3
SHAPES = {
    lab.STORIES: {
        "0.48": {
            "width": {"heads": 4, "mlp": 52},
            "both": {"layers": 4, "heads": 4, "mlp": 76},
            "depth": {"layers": 2},
        },
    }
}


def prefix(model, share, arm):
    return f"axes {model} {share} {arm}"


def cell(model, sizes, seed):
    """Loss as pruned and after retraining."""
    student = lab.pruned(model, seed, sizes=sizes)
    facts = {"before": lab.loss(student, lab.rows(model, "heldout")), "sizes": student.sizes}
    return facts | lab.trained(model, student, "KL", seed, STEPS, RATE)


def run(cells, model, seeds):
    """Every share and shape of a seed, then the next."""
    for seed in seeds:
        for share, arms in SHAPES.get(model, {}).items():
            for arm, sizes in arms.items():
                name = key(prefix(model, share, arm), RATE, seed)
                cells.run(name, partial(cell, model, sizes, seed))


def section(cells):
    """A table for every model and share: before and after."""
    blocks = []
    for model, shares in SHAPES.items():
        for share, arms in shares.items():
            found = {arm: _both(cells, model, share, arm) for arm in arms}
            rows = [[arm, *shown(b), *shown(a)] for arm, (b, a) in found.items()]
            header = ["cut", *["as pruned", "over seeds", "seeds"]]
            header += ["retrained", "over seeds", "seeds"]
            blocks += [f"### {model}, {share} of the parameters", table(header, rows)]
            blocks += _findings(found)
    return blocks


def _both(cells, model, share, arm):
    names = [key(prefix(model, share, arm), RATE, seed) for seed in range(10)]
    found = [cells.found[name] for name in names if name in cells.found]
    return [[c[w] for c in found] for w in ("before", "heldout")]


def _findings(found):
    if not all(after for _, after in found.values()):
        return []
    orders = [", ".join(sorted(found, key=lambda arm: mean(found[arm][when]))) for when in (0, 1)]
    width, both = found["width"], found["both"]
    paper = "as in the paper" if mean(width[1]) < mean(both[1]) else "unlike the paper's"
    return [
        f"From the lowest loss: {orders[0]} as pruned; {orders[1]} after retraining. Width starts "
        f"{against(width[0], both[0])} both and ends {against(width[1], both[1])} it, {paper} "
        "(there width starts above and ends below)."
    ]
