"""A weight that is used masked and trained whole: the straight-through estimator.

    forward    W~ = m * W
    backward   dL/dW = dL/dW~         also where m is 0 (Bengio et al., arXiv 1308.3432)

`Masked` is a parametrization (torch.nn.utils.parametrize): the dense weight stays the parameter
that trains, under the name `parametrizations.weight.original`, and every use of `weight` sees it
masked. The mask is a buffer of the module, so whoever holds the module shares it.

Legend: O outputs, I inputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.numerics.masks import keep_largest


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_OI: Tensor, mask_OI: Tensor) -> Tensor:
        return torch.where(mask_OI, w_OI, 0.0)  # a product would leave zeros with a sign

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return upstream[0], None


class Masked(nn.Module):
    """Keeps the largest weights of a matrix: those of the last `pick`.

    Args:
        w_OI: the weight; the first pick is made from it.
        pattern: "unstructured" or "N:M" (numerics/masks.py); unstructured weights compete
            within a row.
        sparsity: share of weights that go, where the pattern does not say it.
        held_OI: bool, True where a weight is zero for good: it is never picked and never moves.

    Attributes:
        mask_OI: bool, True where a weight stays.
    """

    mask_OI: Tensor
    held_OI: Tensor | None

    def __init__(
        self, w_OI: Tensor, pattern: str, sparsity: float, held_OI: Tensor | None = None
    ) -> None:
        super().__init__()
        self.pattern, self.sparsity = pattern, sparsity
        self.register_buffer("held_OI", held_OI, persistent=False)  # the parent's weights tell it
        self.register_buffer("mask_OI", self._best(w_OI))

    def forward(self, w_OI: Tensor) -> Tensor:
        if self.held_OI is not None:  # then their gradient is zero, also where norms are taken
            w_OI = w_OI.masked_fill(self.held_OI, 0.0)
        return _StraightThrough.apply(w_OI, self.mask_OI)  # type: ignore[return-value]

    def pick(self, w_OI: Tensor) -> Tensor:
        """Choose again by magnitude; returns how many entries of the mask changed."""
        new = self._best(w_OI)
        changed = (new != self.mask_OI).sum()
        self.mask_OI.copy_(new)
        return changed

    def _best(self, w_OI: Tensor) -> Tensor:
        score_OI = w_OI.detach().abs()
        if self.held_OI is None:
            return keep_largest(score_OI, self.pattern, self.sparsity, "row")
        score_OI = score_OI.masked_fill(self.held_OI, -1.0)
        return keep_largest(score_OI, self.pattern, self.sparsity, "row") & ~self.held_OI


def mask_weight(linear: nn.Linear, masked: Masked) -> nn.Parameter:
    """Let a Linear use its weight masked; returns the dense weight, which trains."""
    parametrize.register_parametrization(linear, "weight", masked)
    dense = linear.parametrizations.weight.original  # type: ignore[union-attr]
    assert isinstance(dense, nn.Parameter)
    return dense


def make_hard(linear: nn.Linear) -> None:
    """End `mask_weight`: the masked weight becomes the parameter, and what was hidden is gone."""
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
