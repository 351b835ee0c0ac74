"""Compress a layer column by column, and let the columns that follow make up for each error.

Optimal brain surgery as SparseGPT (arXiv 2301.00774) and GPTQ (arXiv 2210.17323) do it. With H the
second moments of a layer's inputs and U upper triangular, U^T U = (H + damping)^-1, column i is
compressed to q_i, and every later column j takes its share of the error:

    e_i = (w_i - q_i) / u_ii        w_j <- w_j - e_i u_ij  (j > i)        sum e^2 = tr(D H D^T)

with D the change of the whole weight. A weight that goes costs (w / u_ii)^2.

The weight is held transposed, so that a column is contiguous, and errors travel on two levels: at
once within 8 columns, after 8 to the rest of a block of 128, after 128 to all that is left, both
as matrix products. That changes the order of the sums and nothing else.

Legend: O outputs, I inputs, C some columns (consecutive inputs).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compressor.numerics.masks import whole

BLOCK, FEW = 128, 8
DAMPING = 0.01  # of the mean diagonal, as in both papers; ten times more where it does not do
_LEAF = 256  # below it the triangular inverse is left to the library


class Rounding(Protocol):
    """What columns become; a quantizer, say. `span` columns are made ready together.

    Before the first of them, `begin` sees all of them as they are after all errors so far.
    """

    span: int

    def begin(self, first: int, w_CO: Tensor) -> None:
        """Columns `first` to `first + len(w_CO)` are next."""
        ...

    def column(self, i: int, w_O: Tensor) -> Tensor:
        """What column i becomes [O]."""
        ...


@dataclass(frozen=True)
class Factor:
    """U of a Hessian.

    Attributes:
        upper_II: float32, upper triangular, U^T U = (H + damping * mean diagonal)^-1.
        dead_I: True at inputs that were always zero; their weights become zero.
        damping: what it took, in shares of the mean diagonal: 0.01, 0.1, 1 ...
    """

    upper_II: Tensor
    dead_I: Tensor
    damping: float


@dataclass(frozen=True)
class Pick:
    """Which weights stay, decided for `span` columns when the first of them is reached.

    Attributes:
        span: number of columns.
        keep: what each of their weights would cost [C, O] -> True where it stays [C, O].
    """

    span: int
    keep: Callable[[Tensor], Tensor]


def in_blocks(sparsity: float) -> Pick:
    """The costliest weights of every block of 128 columns stay, over all rows."""

    def keep(cost_CO: Tensor) -> Tensor:
        stays = cost_CO.numel() - whole(sparsity, cost_CO.numel())
        places = cost_CO.flatten().topk(stays, sorted=False).indices
        mask = torch.zeros(cost_CO.numel(), dtype=torch.bool)
        return mask.index_fill_(0, places, True).view_as(cost_CO)

    return Pick(BLOCK, keep)


def in_groups(n: int, m: int) -> Pick:
    """The n costliest of every m consecutive inputs stay, in each row."""

    def keep(cost_CO: Tensor) -> Tensor:
        places = cost_CO.topk(n, dim=0, sorted=False).indices
        return torch.zeros_like(cost_CO, dtype=torch.bool).scatter_(0, places, True)

    return Pick(m, keep)


def factorize(h_II: Tensor) -> Factor:
    """Factor of a Hessian [I, I], symmetric and finite; it is left as it is.

    With F the reversal of the order of inputs, H = F L L^T F makes F L F upper triangular, and its
    inverse is U: one decomposition and one triangular inverse. Inputs that were always zero get
    the mean diagonal, which couples them to nothing. Where the damped Hessian is not positive
    definite in float32, damping grows tenfold until it is.

    Raises:
        ValueError: a value is not finite.
    """
    if not bool(h_II.isfinite().all()):
        raise ValueError("a Hessian with NaN or infinite values")
    diagonal = h_II.diagonal().float()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    added = torch.where(dead, mean, 0.0)
    damping = DAMPING
    while (root := _root(h_II, added + damping * mean)) is None:
        damping *= 10
        assert damping < 1e9, "no damping makes this Hessian positive definite"
    return Factor(_inverse(root), dead, damping)


def _root(h_II: Tensor, added_I: Tensor) -> Tensor | None:
    """Upper triangular R with R R^T = H + added; None where that is not positive definite."""
    flipped = h_II.float().flip(0, 1)
    flipped.diagonal().add_(added_I.flip(0))
    lower, failed = torch.linalg.cholesky_ex(flipped)
    return None if int(failed) else lower.flip(0, 1)


def _inverse(r_II: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix, by halves: two thirds of the work of a solve."""
    size = len(r_II)
    if size <= _LEAF:
        return torch.linalg.solve_triangular(r_II, torch.eye(size), upper=True)
    half = size // 2
    found = torch.zeros_like(r_II)
    found[:half, :half] = _inverse(r_II[:half, :half])
    found[half:, half:] = _inverse(r_II[half:, half:])
    coupling = found[:half, :half] @ r_II[:half, half:] @ found[half:, half:]
    found[:half, half:] = coupling.neg_()
    return found


def solve(
    w_OI: Tensor,
    factor: Factor,
    pick: Pick | None = None,
    mask_OI: Tensor | None = None,
    rounding: Rounding | None = None,
) -> Tensor:
    """The compressed weight [O, I] in float32; the given one is left as it is.

    Args:
        w_OI: weight [O, I].
        factor: of the Hessian of its inputs.
        pick: chooses which weights stay; None: all that `mask_OI` leaves.
        mask_OI: bool, False where a weight is zero already and stays zero.
        rounding: what a column becomes; None: what it is. A masked weight is exactly zero
            whatever it gives.
    """
    w_IO = w_OI.float().T.clone(memory_format=torch.contiguous_format)
    w_IO[factor.dead_I] = 0
    stays_IO = None if mask_OI is None else mask_OI.T.contiguous()
    inputs = len(w_IO)
    spans = [part.span for part in (pick, rounding) if part is not None]
    block, few = _levels(math.lcm(*spans), inputs)
    errors = w_IO.new_empty(min(block, inputs), w_IO.shape[1])
    loop = _Loop(w_IO, factor.upper_II, pick, stays_IO, rounding, errors)
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        for first in range(start, end, few):
            last = min(first + few, end)
            loop.columns(first, last, start, end)
            loop.hand_on(first, last, start, last, end)
        loop.hand_on(start, end, start, end, inputs)
    return w_IO.T.contiguous()


def _levels(span: int, inputs: int) -> tuple[int, int]:
    """Columns of a block and of its parts: at the first column of a span, all of it is up to date.

    So a span lies within one part, or begins where a part does and ends with one, in one block.
    """
    span = min(span, inputs)
    few = span * (FEW // span) if span <= FEW else FEW if span % FEW == 0 else span
    unit = max(few, span)
    return unit * max(1, BLOCK // unit), few


@dataclass
class _Loop:
    w_IO: Tensor
    upper_II: Tensor
    pick: Pick | None
    stays_IO: Tensor | None
    rounding: Rounding | None
    errors_CO: Tensor  # of the block under way

    def columns(self, first: int, last: int, start: int, end: int) -> None:
        """Compress columns `first` to `last` of the block `start` to `end`."""
        for i in range(first, last):
            if self.pick is not None and i % self.pick.span == 0:
                self._choose(i, min(i + self.pick.span, end))
            if self.rounding is not None and i % self.rounding.span == 0:
                self.rounding.begin(i, self.w_IO[i : min(i + self.rounding.span, end)])
            w_O, u_C = self.w_IO[i], self.upper_II[i, i:last]
            q_O = w_O if self.rounding is None else self.rounding.column(i, w_O)
            if self._mask is not None:
                q_O = torch.where(self._mask[i - self._from], q_O, 0.0)
            error_O = torch.div(w_O - q_O, u_C[0], out=self.errors_CO[i - start])
            self.w_IO[i + 1 : last].addr_(u_C[1:], error_O, alpha=-1)
            w_O.copy_(q_O)

    def hand_on(self, first: int, last: int, start: int, after: int, end: int) -> None:
        """Columns `after` to `end` take their share of the errors of columns `first` to `last`."""
        errors_CO = self.errors_CO[first - start : last - start]
        shares = self.upper_II[first:last, after:end].T
        self.w_IO[after:end].addmm_(shares, errors_CO, alpha=-1)

    def _choose(self, first: int, last: int) -> None:
        assert self.pick is not None
        cost_CO = (self.w_IO[first:last] / self.upper_II.diagonal()[first:last, None]).square()
        if self.stays_IO is None:
            self._mask, self._from = self.pick.keep(cost_CO), first
            return
        held = self.stays_IO[first:last]
        self._mask = self.pick.keep(cost_CO.masked_fill(~held, -1.0)) & held
        self._from = first

    def __post_init__(self) -> None:
        self._mask, self._from = self.stays_IO, 0  # the mask in force and its first column


def output_energy(d_OI: Tensor, h_II: Tensor) -> float:
    """tr(D H D^T): the mean square output of a weight D, summed over outputs; H whole or [I]."""
    d_OI = d_OI.to(h_II.dtype)
    if h_II.dim() == 1:
        return float((d_OI.square() @ h_II).sum())
    return float((d_OI @ h_II).mul_(d_OI).sum())
