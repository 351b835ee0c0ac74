"""Minitron pruning: rank units by their activations, keep the best, slice the weights once.

arXiv 2407.14679 (Compact Language Models via Pruning and Knowledge Distillation) and
2408.11796. With a_bsu the activation of unit u (neuron, head, residual channel) at token s of
calibration sequence b,

    score_u = sqrt( sum_b ( mean_s |a_bsu| )^2 )          layer_l = 1 - mean cos(x_l, x_l+1)

Neurons and heads are ranked inside their layer, heads inside their query group so that every
group keeps equally many; residual channels are ranked once for the whole network; layers inside
their stack, by block influence as above or by what is lost without them (model/depth.py), one by
one or, as in the second paper, as one window of consecutive layers. All scores come from the
unpruned model (single shot: the paper found no gain from several rounds). Recover with a distill
stage; a pruned model is not usable before that.

`merge_heads` merges heads that go into those that stay (model/heads.py). `preset: paper` is the
first paper's setting, with layers ranked by perplexity; `library` that of NVIDIA Model Optimizer.

Where we differ: by default heads are not merged and layers go by block influence; padding tokens
do not count; in T5, where all layers of a stack share one position bias, heads are ranked by
their sum over the layers.

Legend: L layers, H query heads.
"""

import copy

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.model.budget import Ratios, TargetSizes, sizes_for
from compressor.model.count import count_parameters
from compressor.model.families import Stack
from compressor.model.heads import best_heads, merge_heads, order, own_scores
from compressor.model.importance import Importance, StackImportance
from compressor.model.importance_file import NAME
from compressor.model.model import Model
from compressor.model.shapes import depth_axis
from compressor.model.shrink import Kept, KeptStack, shrink
from compressor.options import exactly_one, options
from compressor.prune.cutting import CutOptions, refuse_formats
from compressor.prune.scores import layers_to_go, reused, score, summary
from compressor.training.workbench import Workbench


@options
class Options(CutOptions):
    """Exactly one of `parameters`, `sizes`, `bytes` and `ratios` says how far to prune."""

    parameters: float | None = Field(
        None, gt=0, lt=1, description="share of the original's parameters that stays"
    )
    sizes: TargetSizes | None = Field(None, description="explicit sizes; the others stay")
    bytes: int | None = Field(None, ge=1, description="bytes of the weights on disk")
    ratios: Ratios | None = Field(None, description="share of each axis that stays")
    scores: str | None = Field(
        None, description="directory of a prune.minitron stage whose importance scores are reused"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> "Options":
        exactly_one(self, ("parameters", "sizes", "bytes", "ratios"))
        return self


def run(model: Model, options: Options, work: Workbench) -> None:
    """Prune `model` in place; notes get the scores, the layers kept and the sizes.

    Raises:
        CompressError: the budget cannot be met, the calibration split is empty, the scores to
            reuse do not fit, or an earlier stage stored a weight format, which slicing would
            break.
    """
    refuse_formats(model)
    before, parameters = model.sizes, count_parameters(model.module)
    after = _target(model, options)
    removed = layers_to_go(model, after)
    if options.scores is None:
        scores = score(model, options, work, removed)
    else:
        scores = reused(model, options, options.scores, removed)
    kept = _keep(model, scores.importance, before, after)
    if options.merge_heads:
        merge_heads(model, scores.importance, after)
    shrink(model, kept, options.rescale)
    assert model.sizes == after
    model.notes["importance"] = summary(scores, removed)
    model.beside[NAME] = scores.file()
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
        return [best_heads(scores_H, before, after) for scores_H in scores_LH]

    return KeptStack(
        neurons=[_best(layer, after["mlp"]) for layer in scores.neurons_LM],
        heads=heads(own_scores(stack, scores)),
        layers=_best_layers(scores, layers),
        cross_heads=None if scores.cross_LH is None else heads(scores.cross_LH),
    )


def _best(scores: Tensor, n: int) -> list[int]:
    """Indices of the n highest scores, ascending; ties go to the lower index."""
    return sorted(order(scores)[:n])


def _best_layers(scores: StackImportance, n: int) -> list[int]:
    """The n best layers, or all but the least important window."""
    if scores.windows_W is None:
        return _best(scores.layers_L, n)
    depth, first = len(scores.layers_L), int(scores.windows_W.argmin())
    gone = range(first, first + depth - n)
    return [i for i in range(depth) if i not in gone]
