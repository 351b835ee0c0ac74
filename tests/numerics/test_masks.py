"""Masks against brute force over groups and rows."""

import itertools
import math

import pytest
import torch

from compressor.numerics.masks import (
    fits,
    group_of,
    implies,
    keep_largest,
    most_in_a_group,
    share_of_zeros,
    sparsity_of,
)
from compressor.numerics.solver import in_blocks


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:5"])
def test_n_of_m_keeps_the_best_subset_of_every_group(pattern):
    n, m = group_of(pattern)
    score = torch.rand(6, 4 * m)
    mask = keep_largest(score, pattern, 0.0, "matrix")
    for row, kept in zip(score.split(m, dim=1), mask.split(m, dim=1), strict=True):
        for own, bits in zip(row, kept, strict=True):
            best = max(itertools.combinations(range(m), n), key=lambda c: float(own[list(c)].sum()))
            assert set(bits.nonzero().flatten().tolist()) == set(best)


def test_rows_lose_equally_or_weights_of_the_whole_matrix_compete():
    score = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    rows = keep_largest(score, "unstructured", 0.5, "row")
    assert rows.tolist() == [[False, False, True, True]] * 2
    matrix = keep_largest(score, "unstructured", 0.5, "matrix")
    assert matrix.tolist() == [[False] * 4, [True] * 4]
    assert int((~keep_largest(score, "unstructured", 0.3, "matrix")).sum()) == 2  # of 2.4


@pytest.mark.parametrize("weights", [100, 700, 1000])
def test_a_share_of_whole_weights_is_met_exactly(weights):
    for hundredths in range(1, 100):  # 0.57 * 100 is 56.99999999999999
        mask = keep_largest(torch.rand(1, weights), "unstructured", hundredths / 100, "row")
        assert int((~mask).sum()) * 100 == hundredths * weights
        kept = in_blocks(hundredths / 100).keep(torch.rand(100, weights // 100))
        assert int((~kept).sum()) * 100 == hundredths * weights


def test_of_equal_scores_the_first_stay():
    mask = keep_largest(torch.zeros(1, 8), "2:4", 0.5, "row")
    assert mask.tolist() == [[True, True, False, False] * 2]


def test_what_patterns_mean():
    assert sparsity_of("1:4") == 0.75 and sparsity_of("unstructured") is None
    assert fits(12, "2:4") and not fits(10, "2:4") and fits(10, "unstructured")
    for wrong in ("4:2", "2:2", "0:4", "dense", "2-4"):
        with pytest.raises(ValueError, match="2:4"):
            group_of(wrong)


@pytest.mark.parametrize("new", ["1:2", "2:4", "1:4", "3:4", "3:8", "4:8", "1:3", "2:3", "2:6"])
@pytest.mark.parametrize("old", ["1:2", "2:4", "1:4", "3:4", "3:8", "4:8", "1:3", "2:3", "2:6"])
def test_a_pattern_implies_another_where_no_row_tells_them_apart(new, old):
    """Against the fullest rows: every group of the new pattern begins, ends or is full anywhere."""
    (n, m), (most, size) = group_of(new), group_of(old)
    length = math.lcm(m, size)
    kept = torch.tensor(
        [[i in chosen for i in range(m)] for chosen in itertools.combinations(range(m), n)]
    )
    worst = 0
    for start in range(0, length, size):  # every group that it meets is the worst for it
        window = torch.zeros(length, dtype=torch.bool)
        window[start : start + size] = True
        parts = window.view(-1, m).float() @ kept.T.float()
        worst = max(worst, int(parts.max(dim=1).values.sum()))
    assert implies(new, old) == (worst <= most)
    assert implies(new, "unstructured") and not implies("unstructured", old)


def test_zeros_are_counted():
    w = torch.tensor([[1.0, 0, 2, 3], [0, 0, 0, 4]])
    assert most_in_a_group(w, 4) == 3 and most_in_a_group(w, 2) == 2
    assert share_of_zeros(w) == 0.5
