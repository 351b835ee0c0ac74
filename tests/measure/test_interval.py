"""The bootstrap over documents, against the textbook's standard error."""

import math

import pytest
import torch

from compressor.measure.interval import estimate


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = estimate(values, torch.ones(400), torch.arange(400))
    error = float(values.std(correction=0)) / math.sqrt(400)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.2 * error)
    assert found.n == 400


def test_rows_of_one_document_are_no_independent_observations():
    values = torch.randn(50, generator=torch.Generator().manual_seed(3))
    single = estimate(values, torch.ones(50), torch.arange(50))
    repeated = estimate(
        values.repeat_interleave(16), torch.ones(800), torch.arange(50).repeat_interleave(16)
    )
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high))
    assert repeated.n == 50


def test_rows_weigh_as_much_as_the_units_they_hold():
    found = estimate(torch.tensor([10.0, 1.0]), torch.tensor([90, 10]), torch.tensor([7, 9]))
    assert found.value == pytest.approx(0.11)
    assert (found.low, found.high) == pytest.approx((0.1, 10 / 90))  # both drawn from one document


def test_one_single_document_is_resampled_by_row_and_the_result_repeats():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0))
    found = estimate(values, torch.ones(40), torch.zeros(40, dtype=torch.int64))
    assert found.low < found.value < found.high and found.n == 40
    assert found == estimate(values, torch.ones(40), torch.zeros(40, dtype=torch.int64))
