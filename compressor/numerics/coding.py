"""How many bits codes take: as they are, and with a Huffman code (arXiv 1802.05668).

    bytes = 4 * (weights left float) + coded bits / 8 + 8 * buckets

which counts two float32 for every bucket. Coded bits are `bits` for every weight or, with
Huffman, the mean code length over the symbols of all tensors pooled; the code's own table is not
counted. The reduction is then (k f) / (k b + 2 f) for buckets of k weights, b bits and f = 32.
"""

import heapq
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def code_lengths(counts: Sequence[int]) -> list[int]:
    """Bits of the Huffman code of every symbol; 0 for one that never occurs, 1 for a lone one."""
    lengths = [0] * len(counts)
    trees = [(count, symbol, [symbol]) for symbol, count in enumerate(counts) if count]
    if len(trees) == 1:
        lengths[trees[0][1]] = 1
    heapq.heapify(trees)
    while len(trees) > 1:
        first, second = heapq.heappop(trees), heapq.heappop(trees)
        below = first[2] + second[2]
        for symbol in below:
            lengths[symbol] += 1
        heapq.heappush(trees, (first[0] + second[0], min(first[1], second[1]), below))
    return lengths


def pooled(codes: Iterable[Tensor]) -> list[int]:
    """How often each of 256 codes occurs in all tensors together."""
    total = torch.zeros(256, dtype=torch.int64)
    for one in codes:
        total += torch.bincount(one.flatten().cpu(), minlength=256)
    return total.tolist()


def huffman_bits(counts: Sequence[int]) -> int:
    """Bits of all symbols together, each in its Huffman code."""
    return sum(count * bits for count, bits in zip(counts, code_lengths(counts), strict=True))


def coded_bytes(floats: int, bits: int, buckets: int) -> float:
    """The paper's size of a model in bytes.

    Args:
        floats: weights that stay float32.
        bits: of all codes together.
        buckets: of all tensors together.
    """
    return 4 * floats + bits / 8 + 8 * buckets
