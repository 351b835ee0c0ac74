"""Why aggregations rank as they do: one axis at a time, after retraining, and against brute force.

Three pairs prune heads, MLP neurons or residual channels alone, or heads and MLP together to half
of the parameters; the loss is measured as pruned and after 200 steps of KL on the same batches, all
at the rate 0.01 (on whole stories 0.003 is better for KL; both arms of a comparison have the same).
Brute force removes every neuron and every head of the original by itself and asks how well the
scores of all nine pairs rank the damage, layer by layer. 3 to 30 seconds a cell; brute force
about 2 minutes.
"""

import itertools
from contextlib import contextmanager
from functools import partial

import lab
import torch
from cells import table
from minitron_zero_shot import PAIRS
from minitron_zero_shot import values as zero_shot_losses
from ranks import spearman
from sweep import NOT_RUN, against, mean, shown

from compressor.model.importance import measure_importance

TITLE = "Aggregations, one axis at a time"
COMPARED = ("l2, mean", "l2, l2", "l2, variance")
AXES = {
    "heads and mlp": {"parameters": 0.5},
    "mlp": {"sizes": {"mlp": 56}},
    "heads": {"sizes": {"heads": 4}},
    "hidden": {"sizes": {"hidden": 40}},
}
CHECKPOINTS = ("stories260K", lab.STORIES)  # the axes are cut to sizes of this one
UNSETTLED = """\
Brute force removes one unit at a time from one checkpoint and a few rows; pruning removes many
together. That the mean over tokens loses neurons that fire rarely but strongly fits these numbers
and is not proved by them, and nothing here says at which size of model the paper's order begins."""
STEPS, RATE = 200, 1e-2
ABLATION = 16  # rows that judge a single removal


def key(what, model, axis, pair, seed):
    return f"aggregation {what} {model} {axis} {pair} seed {seed}"


def student(model, axis, pair, seed):
    """The checkpoint pruned along one axis by the scores of a pair."""
    over_batch, over_sequence = pair.split(", ")
    chosen = {"batch_aggregation": over_batch, "sequence_aggregation": over_sequence}
    return lab.pruned(model, seed, **AXES[axis], **chosen)


def zero_shot(model, axis, pair, seed):
    """Loss as pruned."""
    return {"heldout": lab.loss(student(model, axis, pair, seed), lab.rows(model, "heldout"))}


def retrained(model, axis, pair, seed):
    """Loss after a short retraining."""
    return lab.trained(model, student(model, axis, pair, seed), "KL", seed, STEPS, RATE)


@contextmanager
def without(linear, columns):
    """An output projection that does not hear some of its inputs."""
    kept = linear.weight.data.clone()
    linear.weight.data[:, columns] = 0
    yield
    linear.weight.data.copy_(kept)


def damage(model, held, linear, width):
    """Loss with each group of `width` inputs of a Linear removed alone."""
    losses = []
    for start in range(0, linear.in_features, width):
        with without(linear, slice(start, start + width)):
            losses.append(lab.loss(model, held))
    return losses


@torch.no_grad()
def brute_force(name, seed):
    """{axis: {pair: mean over layers of Spearman(score, damage)}}."""
    model = lab.original(name)
    (stack,) = model.family.stacks
    held = lab.rows(name, "validation")[: ABLATION // 8]
    found = [
        (
            damage(model, held, block.get_submodule(stack.mlp_out), 1),
            damage(model, held, block.get_submodule(stack.attn_out), model.sizes["head_dim"]),
        )
        for block in model.blocks(stack)
    ]
    result = {"mlp": {}, "heads": {}}
    with lab.workbench(name, seed) as work:
        calibration = list(work.batches("train", lab.CALIBRATION // 8, batch=8, length=lab.LENGTH))
    for pair in PAIRS:
        over_batch, over_sequence = pair.split(", ")
        scores = measure_importance(
            model, calibration, over_batch=over_batch, over_sequence=over_sequence
        ).stacks[0]
        for axis, place, rows in (("mlp", 0, scores.neurons_LM), ("heads", 1, scores.heads_LH)):
            each = [spearman(row.tolist(), f[place]) for row, f in zip(rows, found, strict=True)]
            result[axis][pair] = mean(each)
    return result


def run(cells, model, seeds):
    """Zero-shot for all seeds, brute force, then retraining seed by seed."""
    arms = list(itertools.product(AXES if model in CHECKPOINTS else (), COMPARED))
    for seed, (axis, pair) in itertools.product(seeds, arms):
        make = partial(zero_shot, model, axis, pair, seed)
        cells.run(key("zero-shot", model, axis, pair, seed), make)
    cells.run(f"aggregation brute force {model}", partial(brute_force, model, 0))
    for seed, (axis, pair) in itertools.product(seeds, arms):
        make = partial(retrained, model, axis, pair, seed)
        cells.run(key("retrained", model, axis, pair, seed), make)


def section(cells):
    """Loss by axis and pair, before and after retraining; then brute force."""
    blocks = []
    for model in CHECKPOINTS:
        rows = []
        for axis, pair in itertools.product(AXES, COMPARED):
            before, after = (
                _values(cells, w, model, axis, pair) for w in ("zero-shot", "retrained")
            )
            rows.append([axis, pair, *shown(before), *shown(after)])
        header = ["axis", "batch, sequence", "as pruned", "over seeds", "seeds"]
        header += ["retrained", "over seeds", "seeds"]
        blocks += [f"### {model}", table(header, rows)]
        blocks += [_finding(cells, model, axis) for axis in AXES]
        blocks += _brute_force(cells, model)
    return blocks


def _values(cells, what, model, axis, pair):
    found = [cells.found.get(key(what, model, axis, pair, seed)) for seed in range(10)]
    return [c["heldout"] for c in found if c]


def _finding(cells, model, axis):
    """How the paper's pair stands against L2 over the sequence."""
    said = []
    for what, when in (("zero-shot", "as pruned"), ("retrained", "after retraining")):
        first, second = (_values(cells, what, model, axis, pair) for pair in COMPARED[:2])
        if first and second:
            many = min(len(first), len(second))
            seeds = f"{many} seed{'s' if many > 1 else ''}"
            apart = mean(first) - mean(second)
            said.append(f"{against(first, second)} ({apart:+.3f}, {seeds}) {when}")
    return f"- {axis}: ({COMPARED[0]}) is {', '.join(said) or NOT_RUN} against ({COMPARED[1]})"


def _brute_force(cells, model):
    cell = cells.found.get(f"aggregation brute force {model}")
    if cell is None:
        return [f"Brute force: {NOT_RUN}."]
    pairs = sorted(PAIRS, key=lambda pair: -cell["mlp"][pair])
    rows = [[pair, f"{cell['mlp'][pair]:.3f}", f"{cell['heads'][pair]:.3f}"] for pair in pairs]
    header = ["batch, sequence", "MLP neurons", "heads"]
    losses = [zero_shot_losses(cells, model, 0.5, pair) for pair in PAIRS]
    said = f"({COMPARED[0]}) is number {1 + pairs.index(COMPARED[0])} of {len(pairs)} for neurons."
    if all(losses):
        agreement = [cell["mlp"][pair] for pair in PAIRS]
        alike = spearman(agreement, [-mean(values) for values in losses])
        said += (
            " Over the nine pairs, agreement for neurons goes with a low zero-shot loss at half "
            f"of the parameters (Spearman {alike:.2f})."
        )
    return [
        "Spearman's correlation of scores with the loss that removing a unit alone costs, mean "
        "over layers:",
        table(header, rows),
        said,
        UNSETTLED,
    ]
