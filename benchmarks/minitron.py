"""Minitron: which scores find the units worth keeping (arXiv 2407.14679).

    python benchmarks/minitron.py

Zero-shot: a decoder is pruned in width (layers stay) and its loss on held-out text is measured
without any retraining, for the nine pairs of aggregations over batch and sequence, for random
scores and for weight magnitude. Seeds choose the calibration text. About 2 seconds a cell on
stories260K and up to a minute on novels-llama.
"""

import itertools
import math
from functools import partial

import torch
from cells import DATA, Cells, table

from compressor.model.checkpoint import load_directory
from compressor.model.families import present
from compressor.model.importance import Importance, StackImportance, measure_importance
from compressor.prune import minitron
from compressor.training.data import DataSpec, load_corpus, make_batches

AGGREGATIONS = ("l2", "mean", "variance")
PAIRS = [f"{b}, {s}" for b, s in itertools.product(AGGREGATIONS, AGGREGATIONS)]
ARMS = [*PAIRS, "weight magnitude", "random"]
MODELS = {
    "stories260K": {"train": "data/tinystories.txt"},
    "novels-llama": {
        "train": "data/novels.txt",
        "heldout": "checkpoints/novels-llama/heldout-novels.txt",
    },
}
SHARES = (0.75, 0.5)
SEEDS = range(3)
LENGTH, CALIBRATION, HELDOUT = 128, 256, 512  # tokens of a row, rows


FINDING = """\
The paper, pruning a 15B model, finds (L2, mean) first of the nine pairs, (mean, mean) close behind
and variance over the sequence worse. On stories260K it is the other way round: L2 norm or variance
over the sequence come first and the two means last of the nine, at both sizes and for all seeds.
All nine beat random scores and weight magnitude. Why this small model differs is not known yet."""


def batches(name, split, seed, rows):
    """Rows of a split; calibration rows are drawn anew for every seed."""
    data = {k: [str(DATA / v)] for k, v in MODELS[name].items()}
    corpus = load_corpus(DataSpec(**data), "causal-lm")
    model = load_directory(DATA / "checkpoints" / name)
    return list(
        make_batches(
            *(corpus, model.processor, split, rows // 8),
            **{"task": "causal-lm", "seed": seed, "batch": 8, "length": LENGTH},
        )
    )


@torch.no_grad()
def loss(model, held):
    """Nats per token, windows of LENGTH tokens, the first token of a window not scored."""
    total = sum(model.module(input_ids=b["input_ids"], labels=b["input_ids"]).loss for b in held)
    return float(total) / len(held)


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
    model = load_directory(DATA / "checkpoints" / name)
    before, sizes = loss(model, held), model.sizes
    options = minitron.Options(parameters=share)
    after = minitron._target(model, options)
    kept = minitron._keep(model, scores_of(arm, model, calibration, seed), sizes, after)
    minitron.shrink(model, kept)
    return {"before": before, "after": loss(model, held), "sizes": after}


def page(cells):
    """One table for each model: arms by loss after pruning, mean and range over seeds."""
    minutes = sum(c["cell_seconds"] for c in cells.found.values()) / 60
    blocks = ["# Minitron", __doc__.split("\n\n", 2)[2].strip(), cells.where(), FINDING]
    blocks.append(f"{len(cells.found)} cells in {minutes:.0f} minutes.")
    for name, share in itertools.product(MODELS, SHARES):
        found = {
            arm: [c["after"] for s in SEEDS if (c := cells.found.get(key(name, share, arm, s)))]
            for arm in ARMS
        }
        done = sorted((a for a in ARMS if found[a]), key=lambda a: sum(found[a]) / len(found[a]))
        rows = []
        for arm in [*done, *(a for a in ARMS if not found[a])]:
            values = found[arm]
            mean = sum(values) / len(values) if values else math.nan
            spread = f"{min(values):.3f} to {max(values):.3f}" if values else "not run"
            rows.append([arm, f"{mean:.3f}" if values else "not run", spread, str(len(values))])
        blocks.append(f"## Zero-shot loss: {name}, {share} of the parameters")
        blocks.append(table(["batch, sequence", "nats per token", "over seeds", "seeds"], rows))
    return "\n\n".join(blocks) + "\n"


def key(name, share, arm, seed):
    return f"zero-shot {name} {share} {arm} seed {seed}"


def main():
    torch.set_num_threads(1)
    cells = Cells("minitron")
    for name in MODELS:
        held = batches(name, "heldout", 0, HELDOUT)
        for seed, share in itertools.product(SEEDS, SHARES):
            calibration = batches(name, "train", seed, CALIBRATION)
            for arm in ARMS:
                cells.run(
                    key(name, share, arm, seed),
                    partial(cell, name, share, arm, calibration, held, seed),
                )
    cells.page.write_text(page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
