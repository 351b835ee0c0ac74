"""Sparse models: which layers may lose weights, what was promised, and how zeros stay zero.

A sparse layer is an ordinary Linear with zeros, so plain transformers loads it. `Model.formats`
says which pattern its zeros follow, and the zeros themselves are the mask: nothing else is stored.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.manifest import WeightFormat
from compressor.model.model import Model
from compressor.numerics.masks import fits, group_of, most_in_a_group, share_of_zeros


def prunable(model: Model) -> dict[str, nn.Linear]:
    """{module name: Linear} of every Linear inside a block, in order; not embeddings or head."""
    names = {id(module): name for name, module in model.module.named_modules()}
    blocks = [block for stack in model.family.stacks for block in model.blocks(stack)]
    found = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    return {names[id(linear)]: linear for linear in found}


def refuse_undivided(linears: Mapping[str, nn.Linear], pattern: str) -> None:
    """Raise CompressError where N:M does not divide the inputs of a layer; names the first."""
    for name, linear in linears.items():
        if not fits(linear.in_features, pattern):
            raise CompressError(
                f"pattern {pattern} does not divide the {linear.in_features} inputs of '{name}'",
                "undivided: dense leaves such layers as they are",
            )


def promise(model: Model, name: str, pattern: str) -> None:
    """Write into `model.formats` that a layer's zeros follow a pattern, and how many there are."""
    weight = model.module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    form = model.formats.get(name, WeightFormat())
    sparsity = share_of_zeros(weight)
    model.formats[name] = replace(form, pattern=pattern, sparsity=sparsity)


def promised_zeros(model: Model, name: str) -> Tensor | None:
    """True where a layer's weight is zero because a pattern says so [O, I]; None without one."""
    form = model.formats.get(name)
    if form is None or form.pattern is None:
        return None
    weight = model.module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach() == 0


def zero_places(
    model: Model, store: Callable[[Tensor], Tensor] = lambda bits: bits
) -> dict[str, Tensor]:
    """{layer with a pattern: where it is zero, one bit a weight in rows, uint8 [O I / 8]}.

    Layer by layer; `store` says where the bits are kept, in memory as it is.
    """
    found = {}
    for name in model.formats:
        zeros_OI = promised_zeros(model, name)
        if zeros_OI is not None:
            found[name] = store(_bits(zeros_OI))
    return found


def revived(model: Model, places: Mapping[str, Tensor]) -> str:
    """Which weights are not zero any more that were (`zero_places`), in a sentence; or ""."""
    for name, before in places.items():
        weight = model.module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        lost = int(np.unpackbits((before & ~_bits(weight.detach() == 0)).numpy()).sum())
        if lost:
            return f"{lost:,} weights of '{name}' that were zero are not"
    return ""


def _bits(flags: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flags.cpu().numpy()))


def broken_promise(model: Model, formats: Mapping[str, WeightFormat]) -> str:
    """What no longer holds of the patterns in `formats`, in one sentence; "" when all do.

    Works for float and quantized layers alike. A layer may have more zeros than was promised,
    never fewer.
    """
    there = dict(model.module.named_modules())
    for name, form in formats.items():
        if form.pattern is None:
            continue
        weight = getattr(there.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            return f"'{name}' is not a layer of this model"
        group, zeros = group_of(form.pattern), share_of_zeros(weight)
        if group and most_in_a_group(weight, group[1]) > group[0]:
            most = most_in_a_group(weight, group[1])
            return f"'{name}' has {most} weights in a group of {group[1]}, not {group[0]} or fewer"
        if zeros < form.sparsity:
            return f"'{name}' has {zeros:.2%} zeros instead of {form.sparsity:.2%}"
    return ""


def patterns_text(formats: Mapping[str, WeightFormat]) -> str:
    """The patterns in a few words, like "24 layers 2:4 (50.0% zeros)"; "" where there is none."""
    found: dict[str, list[float]] = {}
    for form in formats.values():
        if form.pattern is not None:
            found.setdefault(form.pattern, []).append(form.sparsity)
    return ", ".join(
        f"{len(shares)} layers {pattern} ({_range(min(shares), max(shares))} zeros)"
        for pattern, shares in found.items()
    )


def _range(low: float, high: float) -> str:
    ends = (f"{low:.1%}", f"{high:.1%}")
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


@contextmanager
def zeros_held(model: Model) -> Iterator[None]:
    """Until the block ends, training cannot revive a weight that a pattern says is zero.

    The gradient of such a weight is zero, so it does not count when gradients are clipped, and
    Adam's update of it, weight decay included, is zero as well. Enter before the first step.
    """
    with ExitStack() as hooks:
        for name, form in model.formats.items():
            weight = model.module.get_submodule(name).weight
            if form.pattern is None or not isinstance(weight, nn.Parameter):
                continue
            if weight.requires_grad:
                hooks.callback(weight.register_hook(_masked(weight.detach() != 0)).remove)
        yield


def _masked(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * mask
