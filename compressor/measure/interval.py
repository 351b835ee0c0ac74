"""How sure a number is: a bootstrap over documents.

Tokens of one document resemble each other, so they are no independent observations; documents
are drawn anew instead (Efron 1979; the ratio estimator of Cochran 1977, chapter 6).

    value = sum_d total_d / sum_d weight_d        d runs over documents
    [low, high] = 2.5 % and 97.5 % quantiles of the same ratio over 1,000 resamples of documents
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 1000
SEED = 0  # the interval of the same numbers is always the same


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; `n` is the number of documents resampled."""

    value: float
    low: float
    high: float
    n: int

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """The same estimate through an increasing function."""
        return Estimate(function(self.value), function(self.low), function(self.high), self.n)

    def keys(self, name: str) -> dict[str, float]:
        """{name, name_low, name_high, name_n} as measures return it."""
        return {
            name: self.value,
            f"{name}_low": self.low,
            f"{name}_high": self.high,
            f"{name}_n": self.n,
        }


def estimate(totals: Tensor, weights: Tensor, documents: Tensor) -> Estimate:
    """Ratio of sums with its interval.

    Args:
        totals: [rows] what is averaged, summed over a row (e.g. nats).
        weights: [rows] how many units a row holds (e.g. scored tokens).
        documents: [rows] int64, which document a row belongs to. Where all rows belong to one
            document, rows are resampled instead: one unit has no spread.

    Returns:
        The estimate; sums are in float64.
    """
    assert totals.shape == weights.shape == documents.shape and float(weights.sum()) > 0
    unit = documents.unique(return_inverse=True)[1]
    if int(unit.max()) == 0:
        unit = torch.arange(len(unit))
    n = int(unit.max()) + 1
    top = torch.zeros(n, dtype=torch.float64).index_add(0, unit, totals.double())
    bottom = torch.zeros(n, dtype=torch.float64).index_add(0, unit, weights.double())
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(SEED))
    resampled_bottom = bottom[drawn].sum(dim=1)
    kept = resampled_bottom > 0  # a resample of empty documents only has no ratio
    ratios = top[drawn].sum(dim=1)[kept] / resampled_bottom[kept]
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(top.sum() / bottom.sum()), low, high, n)
