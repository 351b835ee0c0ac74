"""Points of learned codebooks: how many a tensor gets, where they start, and how they move.

Quantiles of the scaled weights are a good start: every point has as many weights. Where many
weights are equal, quantiles are too; those that are double are put into the widest gaps instead.

Legend: P points.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

MOST, FEWEST = 256, 2  # points of a tensor
Start = Literal["quantiles", "uniform"]


def start_points(v: Tensor, count: int, start: Start, signed: bool, pinned: bool) -> Tensor:
    """`count` different points, float32, rising.

    Args:
        v: scaled weights, of any shape.
        start: quantiles of v from 0 to 100 %, or points evenly over [0, 1].
        signed: even points go over [-1, 1].
        pinned: one of them is exactly 0, and quantiles are those of the others.
    """
    free = count - 1 if pinned else count
    shares = np.linspace(0, 1, max(free, 1))
    if start == "uniform":
        found = 2 * shares - 1 if signed else shares
    else:
        values = v.detach().cpu().flatten().numpy()
        values = values[values != 0] if pinned and values.any() else values
        found = np.quantile(values, shares)
    found = found.astype(np.float32)
    return torch.from_numpy(_different(np.append(found, [0.0] * pinned), count))


def _different(points: Any, count: int) -> Any:
    """All different points, and as many more as are missing in the middle of the widest gaps."""
    found = np.unique(points.astype(np.float32))
    if len(found) == 1:
        found = np.append(found, found[0] + np.float32(1))
    while len(found) < count:
        widest = int(np.diff(found).argmax())
        found = np.insert(found, widest + 1, (found[widest] + found[widest + 1]) / 2)
    return found[:count]


def shared_points(norms: Sequence[float], count: int) -> list[int]:
    """Points of every tensor: half of `count` each, the rest in proportion to its gradient.

    What rounding leaves over is taken from those that have most, or given to those that have
    fewest, one by one; none has more than MOST or fewer than FEWEST.
    """
    total, least = count * len(norms), max(count // 2, FEWEST)
    rest, whole = total - least * len(norms), sum(norms)
    shares = [norm / whole if whole else 1 / len(norms) for norm in norms]
    found = [min(least + round(share * rest), MOST) for share in shares]
    while sum(found) > total:
        found[found.index(max(found))] -= 1
    while sum(found) < total:
        found[found.index(min(found))] += 1
    return found


def mean_gap(points_P: Tensor) -> float:
    """Mean distance of two neighbours."""
    return float((points_P.detach().max() - points_P.detach().min()) / (len(points_P) - 1))


@torch.no_grad()
def sort_points(points: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
    """Put points in rising order, and what the optimizer remembers of each with them."""
    for points_P in points:
        order_P = points_P.argsort(stable=True)
        remembered = [v for v in optimizer.state[points_P].values() if isinstance(v, Tensor)]
        for tensor in (points_P, *(v for v in remembered if v.shape == points_P.shape)):
            tensor.copy_(tensor[order_P])


class HasDone(Protocol):
    """Something that counts finished steps."""

    done: Tensor


class InTurns(AdamW):
    """AdamW of weights and of points, which move for `every` steps each, weights first.

    Args:
        weights: groups of the weights.
        points: groups of the points.
        every: steps of a turn.
        clock: has the number of finished steps, `done`.
    """

    def __init__(
        self,
        weights: list[dict[str, Any]],
        points: list[dict[str, Any]],
        every: int,
        clock: HasDone,
        betas: tuple[float, float],
    ) -> None:
        super().__init__([*weights, *points], betas=betas)
        self.every, self.clock, self.weights = every, clock, len(weights)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move those whose turn it is; the others keep what they are and what they remember."""
        assert closure is None
        turn_of_points = bool(int(self.clock.done) // self.every % 2)
        of_weights, of_points = self.param_groups[: self.weights], self.param_groups[self.weights :]
        for group in of_weights if turn_of_points else of_points:
            for parameter in group["params"]:
                parameter.grad = None
        super().step()
