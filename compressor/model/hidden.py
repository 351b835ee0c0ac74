"""What a narrower residual stream does to the numbers around it.

Norms take their statistics over the channels that are left. The papers leave it at that
(arXiv 2407.14679). With D channels cut to d and the others at zero, RMSNorm can be made exact:

    x / sqrt(sum x^2 / D + e) * w  =  x / sqrt(sum x^2 / d + e D/d) * w sqrt(D/d)

so weights grow by sqrt(D/d) and epsilon by D/d. Norms over the features of a head share that
epsilon; their query and key projections grow by sqrt(D/d), which the norm takes out again.
LayerNorm subtracts a mean over the channels, and nothing makes up for that.

Two architectures multiply by the root of the hidden size in code: Gemma the embeddings' output,
T5 (with a tied head) the input of the head by its inverse. The stream would change scale with
its width; `compensate` puts the factor into the weights, and, where the table is also the head,
its inverse into the last norm.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from compressor.errors import CompressError
from compressor.model.families import present
from compressor.model.model import Model


@torch.no_grad()
def rescale_norms(model: Model, ratio: float) -> None:
    """Make RMSNorms, and epsilon in the config, ready for a stream narrower by `ratio` = D/d.

    Raises:
        CompressError: the model has LayerNorms.
    """
    family = model.family
    if family.norm == "layer":
        raise CompressError(
            f"rescale works for RMSNorm; {family.model_type} has LayerNorm, which subtracts a mean",
            "set rescale: false, or keep hidden",
        )
    for norm in stream_norms(model):
        _scale(model, norm, math.sqrt(ratio))
    setattr(model.config, family.eps, getattr(model.config, family.eps) * ratio)
    if family.head_norms:
        for stack in family.stacks:
            for block in model.blocks(stack):
                for linear in present(block, stack.qkv[:2]).values():
                    for parameter in linear.parameters():
                        parameter.mul_(math.sqrt(ratio))


@torch.no_grad()
def compensate(model: Model, before: int) -> None:
    """Undo what code that multiplies by the hidden size does to a stream that was `before` wide."""
    family, factor = model.family, math.sqrt(before / model.sizes["hidden"])
    if family.hidden_scale == "embeddings":
        table: Any = model.module.get_input_embeddings()  # type: ignore[operator]
        table.embed_scale.fill_(table.scalar_embed_scale)  # a buffer: not copied with the sizes
        table.weight.mul_(factor)
        head: Any = model.module.get_output_embeddings()  # type: ignore[operator]
        if head is not None and head.weight is table.weight:
            _scale(model, _last_norm(model), 1 / factor)
    elif family.hidden_scale == "tied head" and getattr(
        model.config, "scale_decoder_outputs", False
    ):
        _scale(model, _last_norm(model), 1 / factor)


def stream_norms(model: Model) -> Iterator[nn.Module]:
    """Every norm over the residual stream."""
    family = model.family
    yield from (model.base.get_submodule(name) for name in family.norms)
    for stack in family.stacks:
        for block in model.blocks(stack):
            yield from present(block, stack.norms).values()


def _last_norm(model: Model) -> nn.Module:
    return model.base.get_submodule(model.family.norms[-1])


def _scale(model: Model, norm: nn.Module, factor: float) -> None:
    weight = norm.get_parameter("weight")
    if model.family.norm == "rms plus one":
        weight.copy_((1 + weight) * factor - 1)
    else:
        weight.mul_(factor)
