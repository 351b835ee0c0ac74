"""Options of prune.minitron beside each other: rankings of layers, treatment of heads, presets.

Layers: three of five stay. Block influence takes one forward pass; perplexity removes every layer,
or every window of two, by itself and looks at the loss on calibration text; brute force tries all
ten choices on validation text. Heads: four of eight stay, their scores being those of all their
features or of the head as a whole. Presets cut every axis, all to the same shape. Every model is
measured as pruned and after 200 steps of KL on the same batches, at one learning rate. 15 to 60
seconds a cell on stories260K.
"""

import itertools
from dataclasses import replace
from functools import partial

import lab
from cells import table
from sweep import NOT_RUN, mean, shown

from compressor.model.shrink import Kept, shrink

TITLE = "Rankings of layers, heads, presets"
CHECKPOINTS = (lab.STORIES,)
LAYERS, BRUTE = 3, "brute force"
STEPS, RATE = 200, 3e-3
WHEN = ("before", "heldout")
KEEP, HEADS = {"sizes": {"layers": LAYERS}}, {"sizes": {"heads": 4}}
ALL_AXES = {"sizes": {"layers": 4, "hidden": 48, "heads": 4, "mlp": 116}}
GROUPS = {
    "layers": {
        "block influence": KEEP,
        "block influence, window": KEEP | {"contiguous": True},
        "perplexity": KEEP | {"layer_importance": "perplexity"},
        "perplexity, window": KEEP | {"layer_importance": "perplexity", "contiguous": True},
        BRUTE: {},
    },
    "heads": {
        "dropped": HEADS,
        "merged": HEADS | {"merge_heads": True},
        "scored as heads": HEADS | {"head_score": "heads"},
    },
    "presets": {
        "none": ALL_AXES,
        "paper": ALL_AXES | {"preset": "paper"},
        "library": ALL_AXES | {"preset": "library"},
    },
}


def key(model, group, arm, seed):
    name = "presets, all axes" if group == "presets" else group  # another shape was tried before
    return f"variants {model} {name} {arm} seed {seed}"


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
    chosen = itertools.combinations(range(depth), LAYERS)
    return {layers: lab.loss(with_layers(name, layers), held) for layers in chosen}


def student(name, group, arm, seed):
    """A model pruned as an arm says, and the layers it keeps."""
    if arm == BRUTE:
        losses = choices(name)
        layers = min(losses, key=losses.__getitem__)
        return with_layers(name, layers), list(layers)
    model = lab.pruned(name, seed, **GROUPS[group][arm])
    return model, model.notes["kept_layers"]


def cell(name, group, arm, seed):
    """Loss as pruned and after a short retraining."""
    model, layers = student(name, group, arm, seed)
    facts = {"before": lab.loss(model, lab.rows(name, "heldout")), "layers": layers}
    facts["sizes"] = model.sizes
    return facts | lab.trained(name, model, "KL", seed, STEPS, RATE)


def run(cells, model, seeds):
    """All arms of a seed, then the next."""
    for seed, group in itertools.product(seeds, GROUPS if model in CHECKPOINTS else ()):
        for arm in GROUPS[group]:
            cells.run(key(model, group, arm, seed), partial(cell, model, group, arm, seed))


def section(cells):
    """A table for each group: layers kept, loss before and after."""
    blocks = []
    for model, group in itertools.product(CHECKPOINTS, GROUPS):
        found = {arm: _values(cells, model, group, arm) for arm in GROUPS[group]}
        rows = [[arm, *_row(values)] for arm, values in found.items()]
        header = [group, "layers kept (seed 0)", "as pruned", "over seeds", "seeds"]
        header += ["retrained", "over seeds", "seeds"]
        blocks += [f"### {model}: {group}", table(header, rows), *_findings(found)]
    return blocks


def _values(cells, model, group, arm):
    return [c for seed in range(10) if (c := cells.found.get(key(model, group, arm, seed)))]


def _row(cells):
    kept = " ".join(str(i + 1) for i in cells[0]["layers"]) if cells else NOT_RUN
    return [kept, *(x for w in ("before", "heldout") for x in shown([c[w] for c in cells]))]


def _findings(found):
    if not all(found.values()):
        return []
    orders = [_order({arm: mean([c[when] for c in found[arm]]) for arm in found}) for when in WHEN]
    return [f"From the lowest loss: {orders[0]} as pruned; {orders[1]} after retraining."]


def _order(losses):
    """Arms from the lowest loss; "=" between those that end at the very same."""
    arms = sorted(losses, key=losses.__getitem__)
    signs = [" = " if losses[a] == losses[b] else ", " for a, b in itertools.pairwise(arms)]
    return arms[0] + "".join(sign + arm for sign, arm in zip(signs, arms[1:], strict=True))
