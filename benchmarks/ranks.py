"""How alike two orders are; ties share their mean rank."""

import numpy as np


def spearman(first, second):
    """Correlation of ranks."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def kendall(first, second):
    """Pairs in the same order minus pairs in the opposite one, over all pairs (tau a)."""
    first, second = np.asarray(first), np.asarray(second)
    upper = np.triu_indices(len(first), 1)
    signs = [np.sign(x[:, None] - x[None, :])[upper] for x in (first, second)]
    return float((signs[0] * signs[1]).mean())


def _ranks(values):
    values = np.asarray(values, dtype=float)
    return ((values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1) + 1) / 2
