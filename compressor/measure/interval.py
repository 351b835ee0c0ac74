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
    units = by_document(torch.stack([totals.double(), weights.double()], dim=1), documents)

    def ratio(times: Tensor) -> Tensor:
        top, bottom = (times @ units).unbind(dim=1)
        return top / bottom

    return bootstrap(ratio, len(units))


def by_document(values: Tensor, documents: Tensor) -> Tensor:
    """Sums of values [rows, K] over each document, float64 [units, K]; see `estimate`."""
    unit = documents.unique(return_inverse=True)[1]
    if int(unit.max()) == 0:
        unit = torch.arange(len(unit))
    sums = torch.zeros(int(unit.max()) + 1, values.shape[1], dtype=torch.float64)
    return sums.index_add(0, unit, values.double())


def bootstrap(statistic: Callable[[Tensor], Tensor], units: int) -> Estimate:
    """A statistic of all units, and its quantiles over resamples of them.

    Args:
        statistic: from how many times each unit was drawn, float64 [N, units], to N values.
        units: how many there are; as many are drawn, with replacement.

    Returns:
        The estimate. A resample without a value (of empty documents only) does not count.
    """
    times = torch.zeros(RESAMPLES, units, dtype=torch.float64)
    drawn = torch.randint(units, times.shape, generator=torch.Generator().manual_seed(SEED))
    found = statistic(times.scatter_add_(1, drawn, torch.ones_like(times)))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(found[found.isfinite()], ends).tolist()
    value = float(statistic(torch.ones(1, units, dtype=torch.float64)))
    return Estimate(value, low, high, units)
