"""How many weights each layer loses: all the same share, or more where less is lost.

`sensitivity` is ours, no paper's. With c the costs of a layer's weights, w^2 h_jj (w^2 where no
data is read) and h the diagonal of the second moments of its inputs, the layer's estimated error
after a share s of its weights went is

    e(s) = (sum of its cheapest s * n costs) / (sum of all its costs)

the relative square error of its output if inputs were uncorrelated. Shares minimize the sum of e
over layers while as many of their weights go as the target says, each within 0.2 of the target and
at most 0.95. As e is convex, giving one small step after another to the layer that pays least per
weight finds the minimum.

Legend: O outputs, I inputs, K steps.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.model import Model
from compressor.model.moments import mean_squares
from compressor.numerics.masks import UNSTRUCTURED, Scope
from compressor.options import nearest, options
from compressor.prune.sparsity import SparseOptions
from compressor.training.workbench import Batch

_REACH, _MOST, _STEPS = 0.2, 0.95, 80


@options
class AllocatedOptions(SparseOptions):
    """How many weights go, and from which layers.

    `sparsity` is the target of the layers that `ratios` does not name: all of one share, or of that
    share on average. What `ratios` names comes on top, so in all more or fewer weights may go.
    """

    allocation: Literal["uniform", "sensitivity"] = Field(
        "uniform",
        description="every layer loses the same share, or more where the estimated error is "
        "small (ours; unstructured only)",
    )
    ratios: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=dict,
        description="{glob of layer names: sparsity} of layers that are excepted and that sparsity "
        "does not count; the last that fits counts, 0 leaves a layer dense (unstructured only)",
    )

    @model_validator(mode="after")
    def _unstructured_only(self) -> "AllocatedOptions":
        uneven = "allocation: sensitivity" if self.allocation == "sensitivity" else "ratios"
        if (self.ratios or self.allocation != "uniform") and self.pattern != UNSTRUCTURED:
            raise ValueError(f"pattern {self.pattern} fixes every layer's sparsity: no {uneven}")
        if self.allocation == "sensitivity" and self.share >= _MOST:
            raise ValueError(f"allocation: sensitivity needs a sparsity below {_MOST}")
        return self


def exceptions(options: AllocatedOptions, names: Sequence[str]) -> dict[str, float]:
    """{layer: share} of the layers that `ratios` names.

    Raises:
        CompressError: a glob fits no layer; names the nearest. Or every layer would stay dense.
    """
    found: dict[str, float] = {}
    for glob, share in options.ratios.items():
        fitting = [name for name in names if fnmatchcase(name, glob)]
        if not fitting:
            raise CompressError(
                f"ratios: '{glob}' fits no layer{nearest(glob, names)}",
                f"write a layer as inspect shows it, or a glob such as *.{names[0].split('.')[-1]}",
            )
        found |= dict.fromkeys(fitting, share)
    if len(found) == len(names) and not any(found.values()):
        raise CompressError(
            "ratios leave every layer dense, so nothing would be pruned", "leave the stage out"
        )
    return found


@torch.no_grad()
def allocate(
    model: Model,
    linears: Mapping[str, nn.Linear],
    options: AllocatedOptions,
    batches: Sequence[Batch] = (),
    scope: Scope = "matrix",
) -> dict[str, float]:
    """{layer: share of its weights that goes}.

    Args:
        batches: what the model reads, for the diagonals; without any, weights alone count.
        scope: within which weights compete for a place.

    Raises:
        CompressError: a glob of `ratios` fits no layer.
    """
    fixed = exceptions(options, list(linears))
    free = {name: linear for name, linear in linears.items() if name not in fixed}
    if options.allocation == "uniform" or not free:
        return {name: fixed.get(name, options.share) for name in linears}
    diagonals = mean_squares(model, free, batches) if batches else {}
    shares = torch.linspace(*_range(options.share), _STEPS + 1)
    curves = {
        name: curve(linear.weight, diagonals.get(name), shares, scope)
        for name, linear in free.items()
    }
    sizes = {name: linear.weight.numel() for name, linear in free.items()}
    return fixed | least_error(curves, sizes, shares, options.share)


def _range(share: float) -> tuple[float, float]:
    return max(0.0, share - _REACH), min(_MOST, share + _REACH)


def curve(w_OI: Tensor, h_I: Tensor | None, shares_K: Tensor, scope: Scope) -> Tensor:
    """Estimated relative error of a layer's output at each share [K], which rise; float64."""
    cost_OI = w_OI.detach().float().square()
    if h_I is not None:
        cost_OI *= h_I
    rising = _rising(cost_OI, scope)
    place_K = shares_K.double() * len(rising)
    first_K = place_K.long()  # between two weights the curve is straight, so it stays convex
    steps = pairwise([0, *first_K.tolist()])
    paid_K = torch.tensor([rising[low:high].sum(dtype=np.float64) for low, high in steps]).cumsum(0)
    next_K = torch.from_numpy(rising[first_K.numpy()]).double()
    total = float(rising.sum(dtype=np.float64))
    return (paid_K + next_K * (place_K - first_K)) / max(total, 1e-30)


def _rising(cost_OI: Tensor, scope: Scope) -> np.ndarray:
    """All costs in rising order, or the sums over rows of the cheapest, the next, ...

    Sorted in place, by numpy: torch.sort holds 24 bytes per weight, which in a large layer is more
    than pruning it takes.
    """
    costs = (cost_OI if scope == "row" else cost_OI.flatten()).cpu().numpy()
    costs.sort(axis=-1)
    return costs.sum(axis=0, dtype=np.float64) if scope == "row" else costs


def least_error(
    curves: Mapping[str, Tensor], sizes: Mapping[str, int], shares_K: Tensor, target: float
) -> dict[str, float]:
    """{layer: share} with the smallest sum of errors under a target share of all weights."""
    step = float(shares_K[1] - shares_K[0])
    prices = [
        (price / sizes[name], number, name)
        for name, errors_K in curves.items()
        for number, price in enumerate(errors_K.diff().tolist())
    ]
    found = dict.fromkeys(curves, float(shares_K[0]))
    missing = (target - float(shares_K[0])) * sum(sizes.values())
    for _, _, name in sorted(prices):
        part = min(1.0, missing / (step * sizes[name]))
        if part <= 0:
            break
        found[name] += part * step
        missing -= part * step * sizes[name]
    return found
