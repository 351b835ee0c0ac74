"""Masks against brute force over groups and rows."""

import itertools

import pytest
import torch

from compressor.numerics.masks import (
    fits,
    group_of,
    keep_largest,
    most_in_a_group,
    share_of_zeros,
    sparsity_of,
)


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


def test_of_equal_scores_the_first_stay():
    mask = keep_largest(torch.zeros(1, 8), "2:4", 0.5, "row")
    assert mask.tolist() == [[True, True, False, False] * 2]


def test_what_patterns_mean():
    assert sparsity_of("1:4") == 0.75 and sparsity_of("unstructured") is None
    assert fits(12, "2:4") and not fits(10, "2:4") and fits(10, "unstructured")
    for wrong in ("4:2", "2:2", "0:4", "dense", "2-4"):
        with pytest.raises(ValueError, match="2:4"):
            group_of(wrong)


def test_zeros_are_counted():
    w = torch.tensor([[1.0, 0, 2, 3], [0, 0, 0, 4]])
    assert most_in_a_group(w, 4) == 3 and most_in_a_group(w, 2) == 2
    assert share_of_zeros(w) == 0.5
