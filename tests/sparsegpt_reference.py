"""SparseGPT (arXiv 2301.00774) straight from the paper, in float64: what the solver is held to."""

import torch

from compressor.numerics.masks import group_of
from compressor.numerics.solver import DAMPING


def by_the_book(w, h, pattern, sparsity, block=128):
    """The paper's algorithm: one column after the other, inverses of what is left made anew."""
    w, h = w.double().clone(), h.double().clone()
    h += DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    left = [h[j:, j:].inverse() for j in range(len(h))]
    group = group_of(pattern)
    span = block if group is None else group[1]
    for j in range(len(h)):
        if j % span == 0:
            end = min(j + span, len(h))
            cost = torch.stack([w[:, c] ** 2 / left[c][0, 0] for c in range(j, end)], 1)
            if group is None:
                gone = int(sparsity * cost.numel())
                mask = cost > cost.flatten().sort().values[gone - 1]
            else:
                mask = cost >= cost.sort(1, descending=True).values[:, group[0] - 1 : group[0]]
        kept = w[:, j] * mask[:, j % span]
        error = (w[:, j] - kept) / left[j][0, 0]
        w[:, j:] -= error[:, None] * left[j][0]
        w[:, j] = kept
    return w
