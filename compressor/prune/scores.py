"""Scores of every unit of a model over calibration sequences: options, passes, notes.

One forward pass scores widths and block influence; a ranking of layers by removal takes one more
pass for each layer, or window of layers, that might go.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from compressor.errors import CompressError
from compressor.model.depth import Removal, consecutive, removal_scores, single_layers
from compressor.model.importance import (
    Aggregation,
    HeadScore,
    Importance,
    Norms,
    measure_importance,
)
from compressor.model.importance_file import Scores, read_scores
from compressor.model.model import Model
from compressor.model.shapes import depth_axis
from compressor.options import options
from compressor.prune.damage import BY_ANSWERS, DAMAGES, Ranking, refuse_unlabelled
from compressor.training.calibrated import calibration
from compressor.training.snapshot import digest
from compressor.training.workbench import Batch, Workbench

_QUANTILES = 64  # enough for a plot of the sorted scores of a layer


@options
class ScoreOptions:
    """How units are scored."""

    samples: int = Field(1024, ge=1, description="calibration sequences")
    length: int = Field(128, ge=2, description="tokens of a calibration sequence")
    batch_aggregation: Aggregation = Field("l2", description="over sequences")
    sequence_aggregation: Aggregation = Field("mean", description="over tokens, of |x|")
    head_score: HeadScore = Field(
        "features", description="norm over a head's features: last, or at each token (heads)"
    )
    norms: Norms = Field("all", description="norms that score channels: all, or those in blocks")
    layer_importance: Ranking = Field(
        "block_influence",
        description="how layers are ranked; all but block_influence remove each and look",
    )
    contiguous: bool = Field(False, description="layers that go are consecutive")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the scores: scores of other settings are other scores."""
        return {field.name: getattr(self, field.name) for field in fields(ScoreOptions)}


def layers_to_go(model: Model, after: dict[str, int]) -> list[int]:
    """How many layers each stack loses on the way to sizes `after`."""
    axes = [depth_axis(number) for number in range(len(model.family.stacks))]
    return [model.sizes[axis] - after[axis] for axis in axes]


def score(model: Model, options: ScoreOptions, work: Workbench, removed: Sequence[int]) -> Scores:
    """Score the units of a model; notes say how many sequences were used.

    Args:
        removed: for each stack, how many layers will go. Rankings by removal are measured only
            where some do; elsewhere layers_L is block influence, which costs nothing.

    Raises:
        CompressError: the calibration split is empty, or rows have no labels.
    """
    batches = calibration(options.samples, options.length, work)
    if options.layer_importance in BY_ANSWERS and any(removed):
        refuse_unlabelled(model, batches[0])
    windows = removed if options.contiguous else [0] * len(removed)
    with work.progress("importance", len(batches)) as advance:
        found = measure_importance(
            model,
            batches,
            over_batch=options.batch_aggregation,
            over_sequence=options.sequence_aggregation,
            head_score=options.head_score,
            norms=options.norms,
            windows=[0] * len(removed) if by_removal(options) else windows,
            advance=advance,
        )
    if by_removal(options) and any(removed):
        found = _with_removals(model, found, options, work, removed, batches)
    stacks = tuple(stack.blocks for stack in model.family.stacks)
    used = sum(len(next(iter(batch.values()))) for batch in batches)
    model.notes["calibration"] = {"asked": options.samples, "used": used}
    weights = digest(model.module.state_dict())
    return Scores(found, stacks, options.settings, tuple(removed), weights)


def reused(model: Model, options: ScoreOptions, path: str, removed: Sequence[int]) -> Scores:
    """Scores that an earlier stage left, in place of forward passes.

    Raises:
        CompressError: as `fitting`, or they are of other weights.
    """
    found = fitting(model, options, path, removed)
    if found.weights != digest(model.module.state_dict()):
        raise CompressError(
            f"the scores at '{path}' were measured on other weights than those of this model",
            "take scores of this very checkpoint, or leave scores out to measure anew",
        )
    return found


def fitting(model: Model, options: ScoreOptions, path: str, removed: Sequence[int]) -> Scores:
    """Scores that an earlier stage left and that may be those of `model`, which needs no weights.

    Raises:
        CompressError: there are none, or they are of another shape or other settings, or do not
            rank the layers that are to go.
    """
    found = read_scores(path)
    found.refuse_other_shapes(model)
    idle = () if any(removed) else ("layer_importance", "contiguous")  # they rank nothing
    for name, value in options.settings.items():
        if name not in idle and found.settings.get(name) != value:
            raise CompressError(
                f"the scores at '{path}' were measured with {name}: {found.settings.get(name)}, "
                f"and {value} is asked for",
                f"set {name}: {found.settings.get(name)}, or leave scores out to measure anew",
            )
    for stack, before, now in zip(found.stacks, found.removed, removed, strict=True):
        enough = before == now if options.contiguous else before > 0 or not by_removal(options)
        if now > 0 and not enough:
            raise CompressError(
                f"the scores at '{path}' were measured to remove {before} layers of {stack}, and "
                f"{now} are to go",
                "remove as many, or leave scores out to measure anew",
            )
    return found


def by_removal(options: ScoreOptions) -> bool:
    """Whether layers are ranked by what is lost without them."""
    return options.layer_importance != "block_influence"


def _with_removals(
    model: Model,
    found: Importance,
    options: ScoreOptions,
    work: Workbench,
    removed: Sequence[int],
    batches: Sequence[Batch],
) -> Importance:
    """Layers, or windows of as many as will go, ranked by what is lost without them."""
    stacks = model.family.stacks
    sets = [removable(model.sizes[depth_axis(i)], n, options) for i, n in enumerate(removed)]
    removals: list[Removal] = [(stacks[i], own) for i, few in enumerate(sets) for own in few]
    with work.progress("layers", len(batches) * len(removals)) as advance:
        scores = removal_scores(
            model, removals, batches, DAMAGES[options.layer_importance], advance
        )
    name = "windows_W" if options.contiguous else "layers_L"
    own = scores.split([len(few) for few in sets])
    return replace(
        found,
        stacks=tuple(
            replace(stack, **{name: values}) if len(values) else stack
            for stack, values in zip(found.stacks, own, strict=True)
        ),
    )


def removable(depth: int, n: int, options: ScoreOptions) -> list[range]:
    """What is removed from a stack of `depth` layers to choose n that go: each, or each window."""
    if n == 0:
        return []
    return consecutive(depth, n) if options.contiguous else single_layers(depth)


def summary(scores: Scores, removed: Sequence[int]) -> dict[str, list]:
    """JSON-able scores for plots: layers and heads whole, wide axes as sorted quantiles.

    An encoder-decoder lists the layers of its encoder first, then those of its decoder. `depth`
    says for each stack what layers were chosen by: {blocks, ranking, window, scores}, of windows
    of so many layers by their first, or, with window 1, of layers.
    """
    found = scores.importance

    def quantiles(row: Tensor) -> list[float]:
        places = torch.linspace(0, 1, min(_QUANTILES, len(row)))
        return row.float().cpu().quantile(places).tolist()

    return {
        "depth": [_decisive(scores, number, n) for number, n in enumerate(removed)],
        "layers": [x for stack in found.stacks for x in stack.layers_L.tolist()],
        "heads": [row for stack in found.stacks for row in stack.heads_LH.tolist()],
        "neurons": [quantiles(row) for stack in found.stacks for row in stack.neurons_LM],
        "hidden": quantiles(found.hidden_D),
    }


def _decisive(scores: Scores, number: int, n: int) -> dict[str, Any]:
    """What the n layers that go from stack `number` are chosen by."""
    stack, measured = scores.importance.stacks[number], scores.removed[number]
    windows = stack.windows_W is not None and n > 0
    ranking = scores.settings["layer_importance"]
    if not windows and (not measured or scores.settings["contiguous"]):
        ranking = "block_influence"  # layers_L is that wherever no layer was removed by itself
    values = stack.windows_W if windows else stack.layers_L
    assert values is not None
    return {
        "blocks": scores.stacks[number],
        "ranking": ranking,
        "window": n if windows else 1,
        "scores": values.tolist(),
    }
