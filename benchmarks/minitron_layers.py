"""Which layers go: block influence, perplexity, a window, or the best of all choices.

Three of the five layers of stories260K stay. Block influence takes one forward pass; perplexity
removes every layer, or every window of two, by itself and looks at the loss on calibration text;
brute force tries all ten choices of layers on validation text. Each model is measured as pruned
and after 200 steps of KL on the same batches. 15 to 60 seconds a cell.
"""

import itertools
from dataclasses import replace
from functools import partial

import minitron_lab as lab
from cells import table
from minitron_sweep import NOT_RUN, mean, shown

from compressor.model.shrink import Kept, shrink

TITLE = "Which layers go"
KEEP = {lab.STORIES: 3}
STEPS, RATE = 200, 1e-2
RANKINGS = {
    "block influence": {"layer_importance": "block_influence"},
    "block influence, window": {"layer_importance": "block_influence", "contiguous": True},
    "perplexity": {"layer_importance": "perplexity"},
    "perplexity, window": {"layer_importance": "perplexity", "contiguous": True},
}
BRUTE = "brute force"
ARMS = (*RANKINGS, BRUTE)


def key(model, arm, seed):
    return f"layers {model} {arm} seed {seed}"


def with_layers(name, layers):
    """The checkpoint with only these layers, widths as they are."""
    model = lab.original(name)
    whole = Kept.everything(model)
    (stack,) = whole.stacks
    shrink(model, replace(whole, stacks=(replace(stack, layers=list(layers)),)))
    return model


def choices(name):
    """{layers kept: loss on validation text} of every choice."""
    depth, held = lab.original(name).sizes["layers"], lab.rows(name, "validation")
    chosen = itertools.combinations(range(depth), KEEP[name])
    return {layers: lab.loss(with_layers(name, layers), held) for layers in chosen}


def student(name, arm, seed):
    """A model without the layers that an arm finds dispensable, and the layers it keeps."""
    if arm == BRUTE:
        losses = choices(name)
        layers = min(losses, key=losses.__getitem__)
        return with_layers(name, layers), list(layers)
    model = lab.pruned(name, seed, sizes={"layers": KEEP[name]}, **RANKINGS[arm])
    return model, model.notes["kept_layers"]


def cell(name, arm, seed):
    """Loss as pruned and after a short retraining."""
    model, layers = student(name, arm, seed)
    before = lab.loss(model, lab.rows(name, "heldout"))
    return {"before": before, "layers": layers} | lab.trained(name, model, "KL", seed, STEPS, RATE)


def run(cells, model, seeds):
    """All arms of a seed, then the next."""
    for seed, arm in itertools.product(seeds, ARMS if model in KEEP else ()):
        cells.run(key(model, arm, seed), partial(cell, model, arm, seed))


def section(cells):
    """Layers kept, loss before and after."""
    blocks = []
    for model in KEEP:
        found = {arm: _values(cells, model, arm) for arm in ARMS}
        rows = [[arm, *_row(values)] for arm, values in found.items()]
        header = ["ranking", "kept (seed 0)", "as pruned", "over seeds", "seeds"]
        header += ["retrained", "over seeds", "seeds"]
        blocks += [f"### {model}", table(header, rows), *_findings(found)]
    return blocks


def _values(cells, model, arm):
    return [c for seed in range(10) if (c := cells.found.get(key(model, arm, seed)))]


def _row(cells):
    kept = " ".join(str(i + 1) for i in cells[0]["layers"]) if cells else NOT_RUN
    return [kept, *(x for w in ("before", "heldout") for x in shown([c[w] for c in cells]))]


def _findings(found):
    if not all(found.values()):
        return []
    orders = [
        ", ".join(sorted(found, key=lambda arm: mean([c[when] for c in found[arm]])))
        for when in ("before", "heldout")
    ]
    return [
        "Layers count from 1; choices that agree give the same model and the same loss. From the "
        f"lowest loss: {orders[0]} as pruned; {orders[1]} after retraining."
    ]
