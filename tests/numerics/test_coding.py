"""Huffman codes against entropy and brute force; the paper's size against its reduction factor."""

import itertools
import math

import pytest
import torch

from compressor.numerics.coding import code_lengths, coded_bytes, huffman_bits, pooled


def shortest(counts):
    """The least bits of any prefix code, by trying all lengths that Kraft's inequality allows."""
    used = [count for count in counts if count]
    best = math.inf
    for lengths in itertools.product(range(1, len(used) + 1), repeat=len(used)):
        if sum(2.0**-n for n in lengths) <= 1:
            best = min(best, sum(n * count for n, count in zip(lengths, used, strict=True)))
    return best


@pytest.mark.parametrize(
    "counts", [[5, 0, 1], [1, 1, 1, 1], [9, 3, 2, 1, 1], [7, 0, 7, 7, 1, 2], [100, 50, 20, 1, 1, 1]]
)
def test_no_prefix_code_is_shorter(counts):
    lengths = code_lengths(counts)
    assert sum(2.0**-n for n in lengths if n) == 1.0  # a whole code
    assert [n == 0 for n in lengths] == [count == 0 for count in counts]
    assert huffman_bits(counts) == shortest(counts)


def test_the_mean_length_is_within_a_bit_of_the_entropy():
    draw = torch.Generator().manual_seed(0)
    for spread in (1.0, 10.0, 60.0):
        codes = (torch.randn(5000, generator=draw) * spread + 128).clamp(0, 255).to(torch.uint8)
        counts = pooled([codes[:3000].view(60, 50), codes[3000:]])
        assert counts == [int((codes == symbol).sum()) for symbol in range(256)]
        shares = [count / 5000 for count in counts if count]
        entropy = -sum(share * math.log2(share) for share in shares)
        assert entropy <= huffman_bits(counts) / 5000 < entropy + 1


def test_a_lone_symbol_takes_a_bit():
    assert code_lengths([0, 7]) == [0, 1] and huffman_bits([0, 7]) == 7


def test_bytes_shrink_by_the_papers_factor():
    k, b, f, buckets = 256, 4, 32, 100
    n = k * buckets
    assert 4 * n / coded_bytes(0, n * b, buckets) == pytest.approx(k * f / (k * b + 2 * f))
    assert coded_bytes(10, 0, 0) == 40
