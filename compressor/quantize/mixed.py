"""Bits layer by layer: more where the estimated error is large, under a budget for all.

`mixed` is ours, no paper's. With h_i the mean square of input i (1 where no data is read), a layer
rounded to nearest with b bits has the estimated error

    e(b) = sum h_i (w'_oi - w_oi)^2 / sum h_i w_oi^2

the relative square error of its output if inputs were uncorrelated. Bits minimize the sum of e
over layers while codes, scales and zero points take at most the budget: from the fewest
bits on, the step that wins most per byte is taken until none fits.

Legend: O outputs, I inputs.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from compressor.errors import CompressError
from compressor.model.model import Model
from compressor.model.moments import mean_squares
from compressor.model.sparse import prunable
from compressor.numerics.quantizer import dequantize, encode
from compressor.quantize.weights import (
    GridOptions,
    Mixed,
    Target,
    grid_of,
    linear_targets,
    shaped_targets,
    targets,
    weight_of,
)
from compressor.training.workbench import Batch


@torch.no_grad()
def mixed_targets(
    model: Model, options: GridOptions, batches: Sequence[Batch] = ()
) -> list[Target]:
    """`weights.targets`, with the bits that `mixed` allots where it is given.

    Args:
        batches: what the model reads, for mean squares of inputs; without any, weights alone count.

    Raises:
        CompressError: see weights.targets; or even the fewest bits do not fit the budget.
    """
    found = targets(model, options)
    if options.mixed is None:
        return found
    refuse_small(model, options)
    inner = {target.name for target in linear_targets(model, found)}
    linears = {n: m for n, m in prunable(model).items() if n in inner}
    squares = mean_squares(model, linears, batches) if batches else {}
    choices = options.mixed.rising
    errors = [
        [_error(model, target, bits, options, squares.get(target.name)) for bits in choices]
        for target in found
    ]
    sizes = [[_bytes(model, t, bits, options) for bits in choices] for t in found]
    allotted = allot(errors, sizes, _budget(model, found, options.mixed))
    found = [replace(t, bits=choices[k]) for t, k in zip(found, allotted, strict=True)]
    model.notes["bits"] = {target.name: target.bits for target in found}
    return found


def refuse_small(model: Model, options: GridOptions) -> None:
    """Refuse a budget that even the fewest bits exceed; of a model no value is read.

    Raises:
        CompressError: with the least that would do; or see weights.shaped_targets.
    """
    mixed = options.mixed
    if mixed is None:
        return
    found = shaped_targets(model, options)
    budget, fewest = _budget(model, found, mixed), mixed.rising[0]
    least = sum(_bytes(model, target, fewest, options) for target in found)
    if least <= budget:
        return
    bits = math.ceil(800 * least / _weights(model, found)) / 100  # rounded up, so that it does
    enough = f"bytes: {least}" if mixed.bytes else f"average_bits: {bits:.2f}"
    fewer = "" if fewest == 2 else ", or fewer bits among mixed.choices"
    raise CompressError(
        f"mixed: {fewest} bits for every layer take {least:,} bytes with their scales, and the "
        f"budget is {int(budget):,}",
        f"mixed.{enough} or more, or a larger group{fewer}",
    )


def _budget(model: Model, found: Sequence[Target], mixed: Mixed) -> float:
    """Bytes that all layers may take together."""
    return mixed.bytes or (mixed.average_bits or 0) * _weights(model, found) / 8


def _weights(model: Model, found: Sequence[Target]) -> int:
    return sum(weight_of(model, target.name).numel() for target in found)


def allot(
    errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: float
) -> list[int]:
    """Number of the choice of every layer: greedy along each layer's convex hull.

    Args:
        errors: of every layer at each choice.
        sizes: bytes, rising; the first choices together are within the budget.
    """
    steps = []
    for layer, (error, size) in enumerate(zip(errors, sizes, strict=True)):
        hull = _hull(error, size)
        for low, high in pairwise(hull):
            gain = (error[low] - error[high]) / (size[high] - size[low])
            steps.append((-gain, layer, high, size[high] - size[low]))
    chosen, left = [0] * len(errors), budget - sum(size[0] for size in sizes)
    stuck: set[int] = set()  # a layer whose next step did not fit takes no later one
    for _, layer, high, more in sorted(steps):
        if layer not in stuck and more <= left:
            chosen[layer], left = high, left - more
        else:
            stuck.add(layer)
    return chosen


def _hull(error: Sequence[float], size: Sequence[int]) -> list[int]:
    """Choices on the lower convex hull of error over size, from the first on."""
    hull = [0]
    while hull[-1] < len(size) - 1:
        last = hull[-1]
        later = range(last + 1, len(size))
        best = max(later, key=lambda k: ((error[last] - error[k]) / (size[k] - size[last]), k))
        if error[best] >= error[last]:
            break
        hull.append(best)
    return hull


def _error(
    model: Model, target: Target, bits: int, options: GridOptions, h_I: Tensor | None
) -> float:
    """Estimated relative square error of a layer's output at some bits."""
    w_OI = weight_of(model, target.name).float()
    scale_OG, zero_OG = grid_of(w_OI, bits, target.group, options)
    off_OI = dequantize(encode(w_OI, scale_OG, zero_OG, bits), scale_OG, zero_OG).sub_(w_OI)
    squares = (off_OI.square_(), w_OI.square())  # w_OI is the model's own
    costs = [each if h_I is None else each.mul_(h_I) for each in squares]
    lost, energy = (float(cost.sum()) for cost in costs)
    return lost / energy if energy else 0.0


def _bytes(model: Model, target: Target, bits: int, options: GridOptions) -> int:
    """Bytes of packed codes, scales and zero points."""
    outputs, inputs = weight_of(model, target.name).shape
    groups = inputs // (target.group or inputs)
    return outputs * (-(-inputs * bits // 8) + groups * (2 if options.symmetric else 3))
