"""Minitron pruning: rank units by their activations, keep the best, slice the weights once.

arXiv 2407.14679 (Compact Language Models via Pruning and Knowledge Distillation) and
2408.11796. With a_bsu the activation of unit u (neuron, head, residual channel) at token s of
calibration sequence b,

    score_u = sqrt( sum_b ( mean_s |a_bsu| )^2 )          layer_l = 1 - mean cos(x_l, x_l+1)

Neurons and heads are ranked inside their layer, heads inside their query group so that every
group keeps equally many; residual channels are ranked once for the whole network. All scores
come from one forward pass over the unpruned model (single shot: the paper found no gain from
several rounds). Recover with a distill stage; a pruned model is not usable before that.

Where we differ: layers go by block influence, not by perplexity after removal; removed heads
are not merged into those that stay; padding tokens do not count; in T5, where all layers of a
stack share one position bias, heads are ranked by their sum over the layers.

Legend: H query heads of one layer, G groups, Q query heads of one group.
"""

import copy
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.errors import CompressError
from compressor.model.budget import TargetSizes, sizes_for
from compressor.model.count import count_parameters
from compressor.model.families import Stack
from compressor.model.importance import (
    Aggregation,
    Importance,
    StackImportance,
    measure_importance,
)
from compressor.model.model import Model
from compressor.model.shapes import depth_axis
from compressor.model.shrink import Kept, KeptStack, shrink
from compressor.options import options
from compressor.training.workbench import Workbench

_BATCH = 8
_QUANTILES = 64  # enough for a plot of the sorted scores of a layer


@options
class Options:
    """Exactly one of `parameters`, `sizes` and `bytes` says how far to prune."""

    parameters: float | None = Field(
        None, gt=0, lt=1, description="share of the original's parameters that stays"
    )
    sizes: TargetSizes | None = Field(None, description="explicit sizes; the others stay")
    bytes: int | None = Field(None, ge=1, description="bytes of the weights on disk")
    multiple: int = Field(8, ge=1, description="a budget rounds the MLP to a multiple of this")
    samples: int = Field(1024, ge=1, description="calibration sequences")
    length: int = Field(128, ge=2, description="tokens of a calibration sequence")
    batch_aggregation: Aggregation = Field("l2", description="over sequences")
    sequence_aggregation: Aggregation = Field("mean", description="over tokens, of |x|")
    layer_importance: Literal["block_influence"] = Field(
        "block_influence", description="how layers are ranked"
    )

    rescale: bool = Field(
        False, description="scale RMSNorms so that removed channels count as zeros (hidden only)"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> "Options":
        given = [k for k in ("parameters", "sizes", "bytes") if getattr(self, k) is not None]
        if len(given) != 1:
            what = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of parameters, sizes and bytes (got {what})")
        return self


def run(model: Model, options: Options, work: Workbench) -> None:
    """Prune `model` in place; notes get the scores, the layers kept and the sizes.

    Raises:
        CompressError: the budget cannot be met, the calibration split is empty, or an earlier
            stage stored a weight format, which slicing would break.
    """
    if model.formats:
        raise CompressError(
            "prune.minitron changes shapes, which would break the weight formats of "
            f"{len(model.formats)} modules",
            "put prune.minitron before the stage that made them",
        )
    before, parameters = model.sizes, count_parameters(model.module)
    after = _target(model, options)
    importance = _importance(model, options, work)
    kept = _keep(model, importance, before, after)
    shrink(model, kept, options.rescale)
    assert model.sizes == after
    model.notes["importance"] = _summary(importance)
    starts = [0, before["layers"]]  # the decoder's layers count on after the encoder's
    model.notes["kept_layers"] = [
        start + i for start, stack in zip(starts, kept.stacks, strict=False) for i in stack.layers
    ]
    model.notes["sizes"] = {
        "before": before | {"parameters": parameters},
        "after": after | {"parameters": count_parameters(model.module)},
    }
    work.log(f"prune.minitron: {model.notes['sizes']}")


def _target(model: Model, options: Options) -> dict[str, int]:
    """Resolve the budget for the very class in memory, in the dtype it will be saved in."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model.module).__name__]
    config.dtype = getattr(torch, model.source_dtype)
    return sizes_for(model.family, config, options)


def _importance(model: Model, options: Options, work: Workbench) -> Importance:
    batch = min(_BATCH, options.samples)
    batches = work.batches(
        "calibration", options.samples // batch, batch=batch, length=options.length
    )
    if len(batches) == 0:
        raise CompressError(
            "the calibration data holds no sequence",
            "name a text with more documents under data.calibration",
        )
    with work.progress("importance", len(batches)) as advance:
        return measure_importance(
            model,
            batches,
            over_batch=options.batch_aggregation,
            over_sequence=options.sequence_aggregation,
            advance=advance,
        )


def _keep(model: Model, scores: Importance, before: dict[str, int], after: dict[str, int]) -> Kept:
    """The best units of every axis, as many as `after` says."""
    stacks = [
        _keep_stack(stack, found, before, after, after[depth_axis(number)])
        for number, (stack, found) in enumerate(
            zip(model.family.stacks, scores.stacks, strict=True)
        )
    ]
    return Kept(tuple(stacks), _best(scores.hidden_D, after["hidden"]))


def _keep_stack(
    stack: Stack,
    scores: StackImportance,
    before: dict[str, int],
    after: dict[str, int],
    layers: int,
) -> KeptStack:
    def heads(scores_LH: Tensor) -> list[list[int]]:
        per_group, groups = after["heads"] // after["kv_heads"], before["kv_heads"]
        return [
            _best_heads(layer.unflatten(0, (groups, -1)), after["kv_heads"], per_group)
            for layer in scores_LH
        ]

    own_LH = scores.heads_LH
    if stack.head_tables:  # one position bias serves all layers, so all keep the same heads
        own_LH = own_LH.sum(dim=0).expand_as(own_LH)
    return KeptStack(
        neurons=[_best(layer, after["mlp"]) for layer in scores.neurons_LM],
        heads=heads(own_LH),
        layers=_best(scores.layers_L, layers),
        cross_heads=None if scores.cross_LH is None else heads(scores.cross_LH),
    )


def _best(scores: Tensor, n: int) -> list[int]:
    """Indices of the n highest scores, ascending; ties go to the lower index."""
    order = scores.argsort(descending=True, stable=True)
    return order[:n].sort().values.tolist()


def _best_heads(scores_GQ: Tensor, groups: int, per_group: int) -> list[int]:
    """The best heads of the best groups; a group scores the L2 norm of its heads."""
    size = scores_GQ.shape[1]
    return [
        group * size + head
        for group in _best(scores_GQ.norm(dim=1), groups)
        for head in _best(scores_GQ[group], per_group)
    ]


def _summary(scores: Importance) -> dict[str, list]:
    """JSON-able scores for plots: layers and heads whole, wide axes as sorted quantiles.

    An encoder-decoder lists the layers of its encoder first, then those of its decoder.
    """

    def quantiles(row: Tensor) -> list[float]:
        places = torch.linspace(0, 1, min(_QUANTILES, len(row)))
        return row.float().cpu().quantile(places).tolist()

    return {
        "layers": [x for stack in scores.stacks for x in stack.layers_L.tolist()],
        "heads": [row for stack in scores.stacks for row in stack.heads_LH.tolist()],
        "neurons": [quantiles(row) for stack in scores.stacks for row in stack.neurons_LM],
        "hidden": quantiles(scores.hidden_D),
    }
