"""Zero-shot: which scores find the units worth keeping.

A decoder is pruned in width (layers stay) and its loss on held-out text is measured without any
retraining, for the nine pairs of aggregations over batch and sequence, for random scores and for
weight magnitude. Seeds choose the calibration text. About 2 seconds a cell on stories260K and up
to a minute on novels-llama.
"""

import itertools
from functools import partial

import lab
import torch
from cells import table
from sweep import mean, shown

from compressor.model.families import present
from compressor.model.importance import Importance, StackImportance, measure_importance
from compressor.prune import minitron

PAPER = """\
The paper, pruning a 15B model, finds (L2, mean) first of the nine pairs, (mean, mean) close
behind and variance over the sequence worse. The file of stories holds markers between stories that
stories260K never saw, and it is split into paragraphs; *whole stories* is the same text without
markers, a story at a time, as the model was trained. Where the tables of the two differ, the text
and not the model decided."""
AGGREGATIONS = ("l2", "mean", "variance")
PAIRS = [f"{b}, {s}" for b, s in itertools.product(AGGREGATIONS, AGGREGATIONS)]
ARMS = [*PAIRS, "weight magnitude", "random"]
SHARES = (0.75, 0.5)
TITLE = "Zero-shot: which scores"


def random_scores(model, seed):
    """Scores that rank by a coin."""
    draw, sizes = torch.Generator().manual_seed(seed), model.sizes
    stack = StackImportance(
        *(torch.rand(sizes["layers"], sizes[axis], generator=draw) for axis in ("mlp", "heads")),
        layers_L=torch.rand(sizes["layers"], generator=draw),
    )
    return Importance((stack,), torch.rand(sizes["hidden"], generator=draw))


@torch.no_grad()
def magnitude_scores(model):
    """L2 norm of all the weights that leave with a unit."""
    (stack,) = model.family.stacks
    neurons, heads = [], []
    hidden = model.module.get_input_embeddings().weight.square().sum(dim=0)
    for block in model.blocks(stack):
        rows = [x.weight.square().sum(dim=1) for x in present(block, stack.mlp_in).values()]
        out = block.get_submodule(stack.mlp_out).weight.square()
        neurons.append((sum(rows) + out.sum(dim=0)).sqrt())
        query = block.get_submodule(stack.qkv[0]).weight.square().sum(dim=1)
        back = block.get_submodule(stack.attn_out).weight.square()
        heads.append((query + back.sum(dim=0)).unflatten(0, (model.sizes["heads"], -1)).sum(dim=1))
        hidden = hidden + out.sum(dim=1) + back.sum(dim=1)
    layers = torch.ones(len(neurons))
    return Importance((StackImportance(torch.stack(neurons), torch.stack(heads), layers),), hidden)


def scores_of(arm, model, calibration, seed):
    """Importance by the arm's rule."""
    if arm == "random":
        return random_scores(model, seed)
    if arm == "weight magnitude":
        return magnitude_scores(model)
    over_batch, over_sequence = arm.split(", ")
    return measure_importance(
        model, calibration, over_batch=over_batch, over_sequence=over_sequence
    )


def cell(name, share, arm, calibration, held, seed):
    """Loss before and after pruning to `share` of the parameters."""
    model = lab.original(name)
    before, sizes = lab.loss(model, held), model.sizes
    options = minitron.Options(parameters=share)
    after = minitron._target(model, options)
    kept = minitron._keep(model, scores_of(arm, model, calibration, seed), sizes, after)
    minitron.shrink(model, kept)
    return {"before": before, "after": lab.loss(model, held), "sizes": after}


def key(name, share, arm, seed):
    return f"zero-shot {name} {share} {arm} seed {seed}"


def run(cells, model, seeds):
    """All arms, both shares."""
    held = lab.rows(model, "heldout")
    for seed, share in itertools.product(seeds, SHARES):
        with lab.workbench(model, seed) as work:
            rows = lab.CALIBRATION // 8
            calibration = list(work.batches("train", rows, batch=8, length=lab.LENGTH))
        for arm in ARMS:
            make = partial(cell, model, share, arm, calibration, held, seed)
            cells.run(key(model, share, arm, seed), make)


def section(cells):
    """One table for each model and share: arms by loss after pruning."""
    blocks = [PAPER]
    for name, share in itertools.product(lab.MODELS, SHARES):
        found = {arm: values(cells, name, share, arm) for arm in ARMS}
        done = sorted((a for a in ARMS if found[a]), key=lambda a: mean(found[a]))
        rows = [[arm, *shown(found[arm])] for arm in [*done, *(a for a in ARMS if not found[a])]]
        blocks.append(f"### {name}, {share} of the parameters")
        blocks.append(table(["batch, sequence", "nats per token", "over seeds", "seeds"], rows))
        blocks += _findings(found, done)
    return blocks


def values(cells, name, share, arm):
    """Losses after pruning, one for each seed that was run."""
    found = [cells.found.get(key(name, share, arm, seed)) for seed in range(10)]
    return [c["after"] for c in found if c]


def _findings(found, done):
    pairs = [arm for arm in done if arm in PAIRS]
    if len(pairs) < len(PAIRS) or not (found["random"] and found["weight magnitude"]):
        return []
    places = ", ".join(f"({p}) {1 + pairs.index(p)}" for p in ("l2, mean", "mean, mean"))
    by_sequence = {
        how: mean([1 + pairs.index(p) for p in pairs if p.endswith(f", {how}")])
        for how in AGGREGATIONS
    }
    average = ", ".join(f"{how} {place:.1f}" for how, place in by_sequence.items())
    worst = max(max(found[p]) for p in pairs)
    beaten = [a for a in ("random", "weight magnitude") if worst < min(found[a])]
    gap = min(found[pairs[-2]]) - max(found[pairs[-3]])
    apart = "apart from" if gap > 0 else "overlapping with"
    baselines = " and ".join(beaten) or "neither of the two baselines"
    return [
        f"Places of nine: {places}; mean place by aggregation over the sequence: {average}. "
        f"The last two, ({pairs[-2]}) and ({pairs[-1]}), are {apart} the seventh over seeds. "
        f"Worse than all nine pairs: {baselines}."
    ]
