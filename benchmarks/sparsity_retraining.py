"""2:4 and 50 %: one-shot pruning, gradual pruning, AST, and its ingredients one by one.

All arms that train take the same batches, 500 steps of 8 rows of 128 tokens (100 steps for
novels-llama), and the same grid of three learning rates; the best on validation text with seed 0 is
run with the other seeds. Where a teacher is asked, the loss is the paper's 0.67 KL (temperature 2)
+ 0.33 cross entropy. Seeds choose calibration text and batches. *Gap closed* is the share of
SparseGPT's loss of perplexity that an arm wins back, against the original and against the original
trained further with the same loss (the fair bound). 2 to 60 seconds a cell on stories260K, 30 to
120 on novels-llama.

*AST* pulls masked weights with 0.1, a thousand times the paper's decay, as the experiment above
says; it alone has such a setting, and *paper's decay* shows what it is worth. *AST + SLoRB* has a
side path of rank inputs/16 whose projection is trained (16 does not divide the 172 inputs of one
layer of seven in stories260K: it has none); *no distillation*, *fixed mask* and *static
decay* are AST without one ingredient. *Gradual magnitude* prunes in three steps and holds the mask.
*SparseGPT, trained* holds SparseGPT's mask from the start.
"""

import math
from functools import partial

import lab
from cells import table
from sweep import NOT_RUN, best_rate, edges, mean, outcomes, shown, sweep, tried

from compressor.distill import ce, kd
from compressor.distill.runner import run as train
from compressor.model.sparse import prunable
from compressor.numerics.masks import share_of_zeros
from compressor.prune import ast, magnitude, sparsegpt, squarehead, wanda
from compressor.training.options import Train

TITLE = "Retraining sparse decoders"
STEPS, SHORTER = 500, {"novels-llama": 100}  # its steps take twenty times as long
PATTERNS = {"2:4": {"pattern": "2:4"}, "50 %": {"pattern": "unstructured", "sparsity": 0.5}}
KL, TEMPERATURE = 0.67, 2.0  # the paper's mixture
ONE_SHOT = {"magnitude": magnitude, "Wanda": wanda, "SparseGPT": sparsegpt}
DENSE = ("dense, trained", "dense, CE")
GRADUAL = ("gradual magnitude", "SparseGPT, trained")
DECAY = 0.1  # see sparsity_decay.py
RATES = (3e-4, 1e-3, 3e-3)
SIDE = {"side": 16, "side_projection": "trainable", "undivided": "dense"}
AST = {
    "AST": {"decay": DECAY},
    "AST + SLoRB": {"decay": DECAY} | SIDE,
    "no distillation": {"decay": DECAY, "kl": 0.0},
    "fixed mask": {"decay": DECAY, "every": None},
    "static decay": {"decay": DECAY, "ramp": 0.0},
    "paper's decay": {},
}
ABLATED = ("no distillation", "fixed mask", "static decay", "paper's decay")  # with 2:4 alone
TRAINED = (*DENSE, "AST", "AST + SLoRB", *GRADUAL, *ABLATED)  # most important first


def prefix(model, pattern, arm):
    if arm == "original" or arm in DENSE:
        return f"retraining {model} {arm}"
    return f"retraining {model} {pattern} {arm}"


def arms_of(pattern):
    """The trained arms of a pattern."""
    return [arm for arm in TRAINED if pattern == "2:4" or arm not in ABLATED]


def cell(model, pattern, arm, seed, lr=None, steps=None):
    """Losses after an arm."""
    student, facts = lab.original(model), {}
    options = Train(
        **{
            "steps": steps or SHORTER.get(model, STEPS),
            "batch": lab.BATCH,
            "length": lab.LENGTH,
            "lr": lr or 1e-3,
        },
        **{"precision": "float32", "snapshot_seconds": 1e6},
    )
    with lab.workbench(model, seed, calibration="train") as work:
        if arm in ONE_SHOT:
            one_shot(student, ONE_SHOT[arm], PATTERNS[pattern], work)
        elif arm in DENSE:
            work.teacher.module.requires_grad_(False)
            objective = _dense(arm, options, student, work.teacher)
            facts = train(student, objective[0], objective[1], work)
        elif arm in AST:
            chosen = ast.Options(**PATTERNS[pattern], **AST[arm], train=options)
            ast.run(student, chosen, work)
        elif arm in GRADUAL:
            squarehead.run(student, _held(arm, pattern, options), work)
    return measured(student, model) | {"lr": lr, "notes": _kept(student.notes)} | _costs(facts)


def one_shot(student, method, pattern, work):
    """Prune without training, from as many rows as prune.minitron reads here."""
    data = {} if method is magnitude else {"samples": lab.CALIBRATION, "length": lab.LENGTH}
    method.run(student, method.Options(**pattern, **data), work)


def _dense(arm, options, student, teacher):
    if arm == "dense, CE":
        options = ce.Options(train=options)
        return ce.objective(options, student, teacher), options
    options = kd.Options(train=options, temperature=TEMPERATURE, ce=1 - KL)
    return kd.objective(options, student, teacher), options


def _held(arm, pattern, options):
    loss = {"squarehead": 0.0, "ce": 1 - KL, "kl": KL, "temperature": TEMPERATURE}
    start = {"start": "magnitude", "gradual": [0.2, 0.35]}
    if arm == "SparseGPT, trained":
        start = {"samples": lab.CALIBRATION, "length": lab.LENGTH}
    return squarehead.Options(**PATTERNS[pattern], **loss, **start, train=options)


def measured(student, model):
    """Losses on both held-out splits, the zeros in the pruned layers, the weights."""
    weights = [layer.weight for layer in prunable(student).values()]
    zeros = sum(share_of_zeros(w) * w.numel() for w in weights)
    return {
        **{s: lab.loss(student, lab.rows(model, s)) for s in ("validation", "heldout")},
        "zeros": zeros / sum(w.numel() for w in weights),
        "parameters": lab.parameters(student),
    }


def _kept(notes):
    """What a stage found, without its long lists."""
    return {k: notes[k] for k in ("flip_rate", "training", "validation") if k in notes}


def _costs(facts):
    return {"tokens": facts["tokens"], "train_seconds": facts["seconds"]} if facts else {}


def run(cells, model, seeds):
    """The original, one-shot methods, then what trains."""
    cells.run(prefix(model, "", "original"), partial(cell, model, "", "original", 0))
    for pattern in PATTERNS:
        for arm in ONE_SHOT:
            for seed in seeds:
                name = f"{prefix(model, pattern, arm)} seed {seed}"
                cells.run(name, partial(cell, model, pattern, arm, seed))
        for arm in arms_of(pattern):
            sweep(
                cells, prefix(model, pattern, arm), partial(cell, model, pattern, arm), seeds, RATES
            )


def section(cells):
    """A table for every model and pattern."""
    blocks = []
    for model in (lab.STORIES, "novels-llama"):
        for pattern in PATTERNS:
            blocks += [f"### {model}, {pattern}", *_table(cells, model, pattern)]
    return blocks


def losses(cells, model, pattern, arm):
    """Held-out losses of an arm over seeds."""
    name = prefix(model, pattern, arm)
    if arm == "original":
        return [cells.found[name]["heldout"]] if name in cells.found else []
    if arm in ONE_SHOT:
        found = [cells.found.get(f"{name} seed {seed}") for seed in range(10)]
        return [c["heldout"] for c in found if c]
    return outcomes(cells, name)


def _table(cells, model, pattern):
    arms = ("original", *ONE_SHOT, *arms_of(pattern))
    found = {arm: losses(cells, model, pattern, arm) for arm in arms}
    ends = [_perplexity(found[arm]) for arm in ("SparseGPT", "original", "dense, trained")]
    names = {arm: prefix(model, pattern, arm) for arm in arms if arm in TRAINED}
    grids = {arm: (best_rate(cells, name), tried(cells, name)) for arm, name in names.items()}
    rows = []
    for arm, values in found.items():
        rate, _ = grids.get(arm, (None, None))
        perplexity = _perplexity(values)
        closed = [_closed(perplexity, ends[0], bound) for bound in ends[1:]]
        shown_perplexity = f"{perplexity:.3f}" if perplexity else NOT_RUN
        rows.append([arm, f"{rate:g}" if rate else "", *shown(values), shown_perplexity, *closed])
    header = ["arm", "best rate", "nats per token", "over seeds", "seeds", "perplexity"]
    return [table([*header, "gap closed %", "to trained dense %"], rows), *edges(grids)]


def _perplexity(values):
    return math.exp(mean(values)) if values else None


def _closed(own, start, bound):
    """Per cent of the way from SparseGPT's perplexity to a bound."""
    if None in (own, start, bound):
        return ""
    return f"{100 * (start - own) / (start - bound):.0f}"
