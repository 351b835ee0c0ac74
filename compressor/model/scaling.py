"""Scales of a Linear's inputs, folded into what makes those inputs: no output of the model changes.

    W x = (W diag(s)) (diag(1/s) x)

1/s goes into the producer of x, in one of three ways:

norm -> Linears  the norm's weight (Gemma's 1 + w) and bias, where nothing but these Linears reads
                 its output: pre-norm models, see Stack.readers
value -> output  rows of the value projection: attention takes weighted means of values, feature by
                 feature. Query heads of one group share a value head, so they share its scales.
MLP in -> out    rows of the up projection of a gated MLP, which is multiplied by the gate's
                 activation; or of the one input projection where the activation is ReLU, for
                 positive scales pass through it

Norms and biases are stored in the model's own dtype, so they are rounded to that at once, and the
Linears get the scale that the norm's weight then really has. Zeros of weights stay zero.

Legend: I inputs of the readers, R rows of the producer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.families import Stack, present
from compressor.model.heads import Rows, attention_rows, cross_rows
from compressor.model.model import Model


@dataclass(frozen=True)
class Fold:
    """A producer and all that reads it.

    Attributes:
        source: name of a norm or Linear.
        rows_I: which of its outputs each input is.
        readers: names of Linears.
    """

    source: str
    rows_I: Tensor
    readers: tuple[str, ...]

    def shared(self, x_I: Tensor, reduce: Literal["mean", "amax"]) -> Tensor:
        """x_I with one value for all inputs that are one output of the producer."""
        rows = int(self.rows_I.max()) + 1
        found_R = x_I.new_zeros(rows).scatter_reduce(
            0, self.rows_I, x_I, reduce, include_self=False
        )
        return found_R[self.rows_I]


def folds(model: Model) -> list[Fold]:
    """Every place of the blocks where scales can go; weights are not looked at."""
    names = {id(module): name for name, module in model.module.named_modules()}
    found = []
    for stack in model.family.stacks:
        for block in model.blocks(stack):
            for source, rows_I, readers in _places(model, stack, block):
                linears: list[Any] = list(present(block, readers).values())
                if not any(_sums_inputs(linear) for linear in linears):
                    source_name = names[id(block.get_submodule(source))]
                    found.append(Fold(source_name, rows_I, tuple(names[id(x)] for x in linears)))
    return found


def unfolded(model: Model) -> list[str]:
    """The Linears of the blocks whose inputs nothing can take scales of."""
    reached = {name for fold in folds(model) for name in fold.readers}
    blocks = [block for stack in model.family.stacks for block in model.blocks(stack)]
    inside = {id(m) for block in blocks for m in block.modules() if isinstance(m, nn.Linear)}
    named = model.module.named_modules()
    return [name for name, module in named if id(module) in inside and name not in reached]


def refuse_unfolded(model: Model) -> None:
    """Refuse a model with Linears whose inputs cannot be scaled for nothing.

    Raises:
        CompressError: names the first.
    """
    left = unfolded(model)
    if left:
        raise CompressError(
            f"nothing can take scales of the inputs of {len(left)} layers, '{left[0]}' the first",
            "unfolded: plain rounds them as they are, unfolded: scale multiplies at run time",
        )


def _sums_inputs(linear: Any) -> bool:
    """Whether a side path adds inputs up, so that they cannot be scaled one by one."""
    side = getattr(linear, "side", None)
    return side is not None and side.in_RI is None


def _places(
    model: Model, stack: Stack, block: nn.Module
) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
    """(path of the producer, rows_I, paths of the readers) of one block."""
    sizes = model.sizes
    if stack.readers_if is None or getattr(model.config, stack.readers_if):
        for norm, readers in stack.readers:
            yield (
                norm,
                torch.arange(len(block.get_submodule(norm).get_parameter("weight"))),
                readers,
            )
    pairs: list[tuple[Rows, str]] = [(attention_rows(stack, sizes)[2], stack.attn_out)]
    if stack.cross_out is not None:
        pairs.append((cross_rows(stack, sizes)[2], stack.cross_out))
    for (value, rows_UD), out in pairs:
        repeats = sizes["heads"] // len(rows_UD)
        yield value, rows_UD.repeat_interleave(repeats, dim=0).flatten(), (out,)
    inputs = list(present(block, stack.mlp_in))
    gated = len(inputs) * stack.mlp_parts == 2
    if gated or any(isinstance(m, nn.ReLU) for m in block.modules()):
        mlp = block.get_submodule(stack.mlp_out).get_parameter("weight").shape[1]
        yield inputs[-1], torch.arange(mlp) + (stack.mlp_parts - 1) * mlp, (stack.mlp_out,)


@torch.no_grad()
def fold_scale(model: Model, fold: Fold, s_I: Tensor) -> Tensor:
    """Multiply the readers' columns by s_I and divide the producer by it, in place.

    Args:
        s_I: float32 [I], positive; equal where inputs are one output of the producer.

    Returns:
        The scale [I] that the readers really got: see above.
    """
    source: Any = model.module.get_submodule(fold.source)
    if isinstance(source, nn.Linear):
        s_R = s_I.new_ones(source.out_features)
        s_R[fold.rows_I] = s_I
        assert torch.equal(s_R[fold.rows_I], s_I), f"'{fold.source}' cannot have several scales"
        _divide_rows(model, source, s_R)
    else:
        s_I = _divide_norm(model, source, s_I)
    for name in fold.readers:
        reader: Any = model.module.get_submodule(name)
        assert isinstance(reader, nn.Linear), f"'{name}' is no float Linear any more"
        reader.weight.data = reader.weight * s_I
        side: Any = getattr(reader, "side", None)
        if side is not None:
            side.in_RI.data = side.in_RI * s_I
    return s_I


def _as_stored(model: Model, tensor: Tensor) -> Tensor:
    """The values that a checkpoint will hold."""
    return tensor.to(getattr(torch, model.source_dtype)).to(tensor.dtype)


def _divide_rows(model: Model, linear: Any, s_R: Tensor) -> None:
    # not in place: the weight may be the mapping of a file
    linear.weight.data = linear.weight / s_R[:, None]
    if linear.bias is not None:
        linear.bias.data = _as_stored(model, linear.bias / s_R)
    side = getattr(linear, "side", None)
    if side is not None:
        side.out_OR.data = side.out_OR / s_R[:, None]


def _divide_norm(model: Model, norm: Any, s_I: Tensor) -> Tensor:
    """Divide a norm by a scale as near to s_I as its stored weight allows; returns that scale."""
    plus = 1.0 if model.family.norm == "rms plus one" else 0.0
    old_I = norm.weight + plus
    weight_I = _as_stored(model, old_I / s_I - plus)
    real_I = old_I / (weight_I + plus)
    sound_I = real_I.isfinite() & (real_I > 0)  # a weight of zero has no scale
    real_I = real_I.where(sound_I, torch.ones_like(real_I))
    norm.weight.data = weight_I.where(sound_I, norm.weight)
    if getattr(norm, "bias", None) is not None:
        norm.bias.data = _as_stored(model, norm.bias / real_I)
    return real_I
