"""The bit stream against a decoder written from its description, one bit after the other."""

import math

import pytest
import torch

from compressor.numerics.huffman import (
    CHUNK,
    LONGEST,
    chunk_bits,
    coded_bits,
    decode,
    encode,
    lengths_of,
)


def coded(codes, symbols):
    counts = torch.bincount(codes.flatten(), minlength=symbols)
    lengths = lengths_of(counts.tolist())
    return encode(codes, lengths), chunk_bits(codes, lengths), lengths, counts


def by_hand(stream, lengths):
    """All codes of a stream, by the words of docs/formats.md."""
    words, word, before = {}, 0, 0
    for bits, symbol in sorted((int(n), s) for s, n in enumerate(lengths) if n):
        word = word * 2 ** (bits - before)
        words[f"{word:0{bits}b}"] = symbol
        word, before = word + 1, bits
    text, found, start = "".join(f"{byte:08b}" for byte in stream.tolist()), [], 0
    for end in range(1, len(text) + 1):
        if text[start:end] in words:
            found.append(words[text[start:end]])
            start = end
    return found


def skewed(count, symbols, seed=0):
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=draw) * symbols / 8 + symbols / 2
    return normal.round().clamp(0, symbols - 1).to(torch.uint8)


@pytest.mark.parametrize("count", [1, 7, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
@pytest.mark.parametrize("symbols", [4, 16, 256])
def test_a_stream_is_what_its_description_says(count, symbols):
    codes = skewed(count, symbols)
    stream, chunks, lengths, _ = coded(codes, symbols)
    assert by_hand(stream, lengths)[:count] == codes.tolist()
    assert torch.equal(decode(stream, chunks, lengths, count), codes)
    sizes = lengths[codes.long()].long()
    assert chunks.tolist() == [int(part.sum()) for part in sizes.split(CHUNK)]


def test_it_takes_hardly_more_than_the_entropy():
    codes = skewed(200_000, 16)
    stream, _, lengths, counts = coded(codes, 16)
    shares = counts[counts > 0].double() / len(codes)
    entropy = float(-(shares * shares.log2()).sum())
    assert entropy <= 8 * len(stream) / len(codes) < entropy + 0.1
    assert -(-coded_bits(counts, lengths) // 8) == len(stream)


def test_one_symbol_alone_takes_a_bit():
    codes = torch.full((2000,), 9, dtype=torch.uint8)
    stream, chunks, lengths, _ = coded(codes, 16)
    assert len(stream) == 250 and lengths.tolist()[9] == 1
    assert torch.equal(decode(stream, chunks, lengths, 2000), codes)


def test_no_code_is_too_long_for_the_table():
    """Frequencies of Fibonacci make Huffman's code as long as it can be."""
    counts, pair = [], (1, 1)
    for _ in range(40):
        counts.append(pair[0])
        pair = (pair[1], sum(pair))
    lengths = lengths_of(counts)
    assert int(lengths.max()) <= LONGEST
    assert math.isclose(sum(2.0 ** -int(n) for n in lengths), 1.0)
    codes = torch.arange(40, dtype=torch.uint8).repeat(30)
    stream, chunks = encode(codes, lengths), chunk_bits(codes, lengths)
    assert torch.equal(decode(stream, chunks, lengths, len(codes)), codes)


def test_blocks_of_a_large_table_join(monkeypatch):
    monkeypatch.setattr("compressor.numerics.huffman._BLOCK", 2 * CHUNK)
    codes = skewed(7 * CHUNK + 13, 16).view(-1)
    stream, chunks, lengths, _ = coded(codes, 16)
    assert torch.equal(decode(stream, chunks, lengths, len(codes)), codes)


def test_damage_is_noticed():
    codes = skewed(3000, 16)
    stream, chunks, lengths, _ = coded(codes, 16)
    moved = chunks.clone()
    moved[0], moved[1] = moved[0] + 1, moved[1] - 1
    crowded = torch.ones(16, dtype=torch.uint8)
    for parts in (
        (stream[:-1], chunks, lengths, 3000),
        (stream, chunks[:-1], lengths, 3000),
        (stream, moved, lengths, 3000),
        (stream, chunks, crowded, 3000),
    ):
        with pytest.raises(ValueError, match=r"stream|chunk|lengths"):
            decode(*parts)
