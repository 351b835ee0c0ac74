"""Codes in a canonical Huffman code: a stream of bits, and back without a loop over codes.

A symbol s has a code of `lengths[s]` bits; shorter codes come first, and of one length the smaller
symbol: the first code is all zeros, each next one is the one before plus 1, with zeros appended
where it is longer. Codes follow each other in a stream, most significant bit first. Every CHUNK
codes the number of their bits is noted, so that all chunks are decoded at once, one code of each at
a time.

No code is longer than LONGEST bits, which a table of 2^16 entries looks up.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compressor.numerics.coding import code_lengths

CHUNK = 1024  # codes; at most 2^14 bits of them, which int16 holds
LONGEST = 16
_BLOCK = 1024 * CHUNK  # codes that are encoded at once


def lengths_of(counts: Sequence[int]) -> Tensor:
    """Code lengths, uint8 [symbols], for symbols that occur that often; 0: never.

    Those of Huffman's code, or, where that has codes of more than LONGEST bits, of frequencies
    that are halved until it has none.
    """
    found = code_lengths(counts)
    while max(found) > LONGEST:
        counts = [-(-count // 2) for count in counts]
        found = code_lengths(counts)
    return torch.tensor(found, dtype=torch.uint8)


def coded_bits(counts: Tensor, lengths: Tensor) -> int:
    """Bits of the whole stream, for symbols that occur `counts` times."""
    return int((counts.long() * lengths.long()).sum())


def chunk_bits(codes: Tensor, lengths: Tensor) -> Tensor:
    """Bits of every CHUNK codes of the flattened `codes`, int16; the last chunk may be shorter."""
    found = []
    for block in codes.flatten().split(_BLOCK):
        bits = lengths[block.long()].int()
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % CHUNK))
        found.append(bits.view(-1, CHUNK).sum(1).to(torch.int16))
    return torch.cat(found)


def encode(codes: Tensor, lengths: Tensor) -> Tensor:
    """The stream, uint8 [bytes]; its last byte is filled up with zeros.

    Args:
        codes: uint8, any shape; every code has a length.
    """
    words, sizes = _canonical(lengths), lengths.numpy().astype(np.int64)
    left, parts = np.empty(0, np.uint8), []
    for block in codes.flatten().split(_BLOCK):
        symbols = block.numpy()
        own = sizes[symbols]
        starts = np.cumsum(own) - own
        bits = np.zeros(int(own.sum()), np.uint8)
        for place in range(int(sizes.max())):
            has = own > place
            shift = own[has] - 1 - place
            bits[starts[has] + place] = (words[symbols[has]] >> shift) & 1
        bits = np.concatenate([left, bits])
        whole = len(bits) // 8 * 8
        parts.append(np.packbits(bits[:whole]))
        left = bits[whole:]
    return torch.from_numpy(np.concatenate([*parts, np.packbits(left)]))


def decode(stream: Tensor, chunks: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The `count` codes of a stream, uint8 [count].

    Raises:
        ValueError: the parts do not fit each other.
    """
    bits = chunks.numpy().astype(np.int64)
    ends = np.cumsum(bits)
    if len(bits) != -(-count // CHUNK) or (bits < 0).any() or -(-int(ends[-1]) // 8) != len(stream):
        raise ValueError("the stream is not as long as its chunks say")
    symbol, size = _table(lengths)
    padded = np.concatenate([stream.numpy(), np.zeros(3, np.uint8)]).astype(np.uint32)
    windows = (padded[:-2] << 16) | (padded[1:-1] << 8) | padded[2:]  # of 24 bits, at every byte
    found = np.empty((CHUNK, len(bits)), np.uint8)
    place, last = ends - bits, len(windows) - 1
    rest = count - (len(bits) - 1) * CHUNK  # codes of the last chunk
    reached = 0
    for code in range(min(CHUNK, count)):
        byte = np.minimum(place >> 3, last)
        prefix = (windows[byte] >> (8 - (place & 7)).astype(np.uint32)) & 0xFFFF
        found[code] = symbol[prefix]
        place = place + size[prefix]
        if code == rest - 1:
            reached = int(place[-1])
    if (place[:-1] != ends[:-1]).any() or reached != ends[-1]:
        raise ValueError("a chunk does not end where it should")
    return torch.from_numpy(np.ascontiguousarray(found.T).reshape(-1)[:count].copy())


def _canonical(lengths: Tensor) -> np.ndarray:
    """The code word of every symbol, int64."""
    words, word, before = np.zeros(len(lengths), np.int64), 0, 0
    for size, symbol in sorted((int(n), s) for s, n in enumerate(lengths) if n):
        word <<= size - before
        words[symbol], before = word, size
        word += 1
    return words


def _table(lengths: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(symbol uint8, bits int64) for every 16 bits that a stream may go on with; 0 bits: no code.

    Raises:
        ValueError: no code has such lengths.
    """
    symbol, size = np.zeros(2**LONGEST, np.uint8), np.zeros(2**LONGEST, np.int64)
    present = [n for n in lengths.tolist() if n]
    if not present or max(present) > LONGEST or sum(2.0**-n for n in present) > 1:
        raise ValueError("no code has such lengths")
    for index, word in enumerate(_canonical(lengths).tolist()):
        bits = int(lengths[index])
        if bits:
            low = word << (LONGEST - bits)
            symbol[low : low + 2 ** (LONGEST - bits)] = index
            size[low : low + 2 ** (LONGEST - bits)] = bits
    return symbol, size
