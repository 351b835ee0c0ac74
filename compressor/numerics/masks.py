"""Which weights stay: unstructured and N:M patterns.

A pattern is "unstructured" or "N:M". N:M keeps at most N of every M consecutive *inputs* of an
output row, as sparse tensor cores want it (2:4); a row without a whole number of groups has no
such mask. Masks are bool, True where a weight stays.

Legend: O outputs, I inputs.
"""

import math
import re
from typing import Literal

import torch
from torch import Tensor

UNSTRUCTURED = "unstructured"
Scope = Literal["row", "matrix"]  # within which weights compete for a place


def group_of(pattern: str) -> tuple[int, int] | None:
    """(N, M) of "N:M"; None for "unstructured".

    Raises:
        ValueError: the text is no pattern, or N is not between 0 and M.
    """
    if pattern == UNSTRUCTURED:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(f"pattern must be {UNSTRUCTURED} or N:M with 0 < N < M, like 2:4")
    return int(found[1]), int(found[2])


def sparsity_of(pattern: str) -> float | None:
    """Share of zeros that "N:M" means; None for "unstructured", which says nothing about it."""
    group = group_of(pattern)
    return None if group is None else 1 - group[0] / group[1]


def implies(new: str, old: str) -> bool:
    """Whether all weights with the pattern `new` have the pattern `old` as well.

    2:4 implies 4:8, and 1:8 implies 2:4; 2:4 and 3:8 imply neither the other. How many zeros an
    unstructured pattern wants is not part of it: whoever compares them compares shares.
    """
    inner, outer = group_of(new), group_of(old)
    if inner is None or outer is None:
        return outer is None
    (n, m), (most, size) = inner, outer
    return all(
        _most_between(start, start + size, n, m) <= most
        for start in range(0, math.lcm(m, size), size)
    )


def _most_between(start: int, end: int, n: int, m: int) -> int:
    """The largest number of weights that n:m leaves in columns `start` to `end`."""
    groups = range(start // m, -(-end // m))
    return sum(min(n, min(end, (g + 1) * m) - max(start, g * m)) for g in groups)


def fits(inputs: int, pattern: str) -> bool:
    """Whether rows of `inputs` weights can have the pattern."""
    group = group_of(pattern)
    return group is None or inputs % group[1] == 0


def whole(sparsity: float, weights: int) -> int:
    """Weights of so many that go, rounded down; 0.57 of 100 are 57, whatever floats make of it."""
    return int(sparsity * weights + 1e-6)


def keep_largest(score_OI: Tensor, pattern: str, sparsity: float, scope: Scope) -> Tensor:
    """The mask [O, I] that keeps the highest scores; of equal ones, those that come first.

    Args:
        score_OI: finite scores [O, I].
        pattern: "unstructured" or "N:M"; N:M needs M to divide I, and ignores what follows.
        sparsity: share of weights that go, rounded down to a whole number of them.
        scope: "row": every row loses as many; "matrix": all weights compete.
    """
    group = group_of(pattern)
    if group is not None:
        assert score_OI.shape[1] % group[1] == 0, f"{pattern} does not divide {score_OI.shape}"
        return _largest(score_OI.unflatten(1, (-1, group[1])), group[0]).flatten(1)
    pool = score_OI if scope == "row" else score_OI.reshape(1, -1)
    return _largest(pool, pool.shape[-1] - whole(sparsity, pool.shape[-1])).view_as(score_OI)


def _largest(score: Tensor, n: int) -> Tensor:
    """True at the `n` highest places of the last axis."""
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)


def most_in_a_group(w_OI: Tensor, m: int) -> int:
    """The largest number of nonzero weights in any `m` consecutive inputs; m divides I."""
    return int((w_OI != 0).unflatten(1, (-1, m)).sum(-1).max())


def share_of_zeros(w_OI: Tensor) -> float:
    """Zeros over all weights."""
    return 1 - int(w_OI.count_nonzero()) / w_OI.numel()
