"""Expected calibration error: how far confidence and accuracy lie apart (arXiv 1706.04599).

    ECE = sum over bins b of  n_b / n  |acc(b) - conf(b)|  =  sum_b |sum_{i in b} (hit_i - p_i)| / n

p_i is the probability of the most likely answer at position i, hit_i whether it is the right one;
bin b of 15 holds the positions with p in ((b - 1) / 15, b / 15]. Equation 3 of Guo et al. (2017).
0 is calibrated, and lower is better. With few positions the number is too large (noise in a bin
counts as distance), and that of every resample more so: read it beside the original's.
"""

import torch
from torch import Tensor

from compressor.measure.interval import Estimate, bootstrap, by_document

BINS = 15


def deviations(logits_PV: Tensor, answers_P: Tensor) -> Tensor:
    """Sum of hit - p of the positions in each bin, float64 [15]."""
    top_P, answer_P = logits_PV.double().max(dim=-1)
    p_P = (top_P - logits_PV.double().logsumexp(dim=-1)).exp()
    bin_P = (p_P * BINS).ceil().long().clamp(1, BINS) - 1
    zero = torch.zeros(BINS, dtype=torch.float64)
    return zero.index_add(0, bin_P, (answer_P == answers_P).double() - p_P)


def calibration_error(deviations_RB: Tensor, counts_R: Tensor, documents_R: Tensor) -> Estimate:
    """ECE with its interval over documents.

    Args:
        deviations_RB: [rows, 15], `deviations` of each row.
        counts_R: [rows], positions of each row.
        documents_R: [rows] int64, which document a row belongs to; see interval.estimate.
    """
    both = torch.cat([deviations_RB.double(), counts_R.double()[:, None]], dim=1)
    units_UB = by_document(both, documents_R)

    def error(drawn_NU: Tensor) -> Tensor:
        sums_NB = drawn_NU @ units_UB
        return sums_NB[:, :-1].abs().sum(dim=1) / sums_NB[:, -1]

    return bootstrap(error, len(units_UB))
