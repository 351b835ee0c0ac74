"""Sparse matrices come back bit for bit, and lie in the order the file formats promise."""

import pytest
import torch

from compressor.numerics.masks import keep_largest
from compressor.numerics.packing import pack, unpack
from compressor.numerics.sparse_packing import (
    index_bits,
    index_bytes,
    pack_bitmask,
    pack_groups,
    unpack_bitmask,
    unpack_groups,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8]
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits_of(tensor):
    return tensor.contiguous().view(INTEGER[tensor.dtype.itemsize])


def random_matrix(rows, inputs, dtype, seed=0, keep=0.5):
    """Random *bit patterns*, so NaN payloads, infinities and subnormals too; +0 where dropped."""
    draw = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows, inputs * dtype.itemsize), generator=draw)
    w_OI = raw.to(torch.uint8).view(dtype)
    dropped = torch.rand(rows, inputs, generator=draw) >= keep
    # -0.0 has its own test
    return w_OI.masked_fill(dropped | (w_OI == 0), 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (4, 17), (2, 64), (0, 4)])
def test_bitmask_is_what_plain_integers_say(dtype, keep, shape):
    w_OI = random_matrix(*shape, dtype, sum(shape), keep)
    if shape[0] > 2:
        w_OI[1] = 0  # a row without a value
        w_OI[2] = torch.arange(1, shape[1] + 1)  # and one without a zero
    mask_OB, values_K = pack_bitmask(w_OI)
    raw, rows, values = bits_of(w_OI).tolist(), [], []
    for row in raw:
        as_integer = sum(1 << i for i, value in enumerate(row) if value)
        rows.append(list(as_integer.to_bytes(-(-shape[1] // 8), "little")))
        values += [value for value in row if value]
    assert mask_OB.dtype == torch.uint8 and mask_OB.tolist() == rows
    assert values_K.dtype == dtype and bits_of(values_K).tolist() == values
    again = unpack_bitmask(mask_OB, values_K, shape[1])
    assert again.dtype == dtype and torch.equal(bits_of(again), bits_of(w_OI))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", [(2, 4), (1, 2), (1, 3), (4, 8), (3, 16), (2, 17), (5, 256)])
@pytest.mark.parametrize("groups", [1, 3])
def test_groups_are_what_plain_integers_say(dtype, pattern, groups):
    (n, m), rows = pattern, 6
    w_OI = random_matrix(rows, groups * m, dtype)
    score_OI = torch.rand(w_OI.shape, generator=torch.Generator().manual_seed(1))
    w_OI = w_OI.masked_fill(~keep_largest(score_OI, f"{n}:{m}", 0.5, "row"), 0)
    w_OI[1], w_OI[2, : m - 1] = 0, 0  # a row and a group without values
    index_OB, values_OGN = pack_groups(w_OI, n, m)
    bits = next(b for b in (1, 2, 4, 8) if 2**b >= m)
    packed, values = [], []
    for row in bits_of(w_OI).tolist():
        as_integer, stored = 0, []
        for start in range(0, len(row), m):
            group = row[start : start + m]
            full = [i for i in range(m) if group[i]]
            free = [i for i in range(m) if not group[i]]
            places = sorted(full + free[: n - len(full)])
            stored.append([group[i] for i in places])
            for i, place in enumerate(places):
                as_integer |= place << (bits * (start // m * n + i))
        packed.append(list(as_integer.to_bytes(-(-groups * n * bits // 8), "little")))
        values.append(stored)
    assert index_OB.dtype == torch.uint8 and index_OB.tolist() == packed
    assert index_OB.shape[1] == index_bytes(groups, n, m)
    assert values_OGN.dtype == dtype and bits_of(values_OGN).tolist() == values
    again = unpack_groups(index_OB, values_OGN, m)
    assert again.dtype == dtype and torch.equal(bits_of(again), bits_of(w_OI))


def test_negative_zero_is_a_zero():
    w_OI = torch.tensor([[1.0, -0.0, -2.0, 0.0], [-0.0, -0.0, -0.0, 3.0]])
    packed = unpack_bitmask(*pack_bitmask(w_OI), 4), unpack_groups(*pack_groups(w_OI, 2, 4), 4)
    for again in packed:
        assert torch.equal(again, w_OI) and not again[w_OI == 0].signbit().any()
    assert len(pack_bitmask(w_OI)[1]) == 3


def test_many_rows_are_one_matrix():
    w_OI = random_matrix(2500, 8, torch.float16)
    w_OI[:, [0, 3, 5, 6]] = 0
    again = unpack_groups(*pack_groups(w_OI, 2, 4), 4)
    assert torch.equal(bits_of(again), bits_of(w_OI))


def test_damage_is_seen():
    w_OI = torch.tensor([[1.0, 0.0, 2.0, 0.0]])
    mask_OB, values_K = pack_bitmask(w_OI)
    with pytest.raises(ValueError, match="keeps 3 values and 2 are stored"):
        unpack_bitmask(mask_OB | 2, values_K, 4)
    index_OB, values_OGN = pack_groups(w_OI, 2, 4)
    assert index_OB.tolist() == [[0b1000]]
    for damaged in (0b0000, 0b0010):  # the same place twice; places that fall
        with pytest.raises(ValueError, match="a group of 4 do not ascend"):
            unpack_groups(torch.full_like(index_OB, damaged), values_OGN, 4)
    index_OB, values_OGN = pack_groups(torch.tensor([[0.0, 0.0, 5.0]]), 1, 3)
    with pytest.raises(ValueError, match="a group of 3"):
        unpack_groups(index_OB | 3, values_OGN, 3)


def test_places_of_large_groups_have_no_byte():
    assert [index_bits(m) for m in (2, 3, 4, 5, 16, 17, 256, 257)] == [1, 2, 2, 4, 4, 8, 8, None]


def test_single_bits_are_packed_lowest_first():
    codes = torch.tensor([[1, 0, 0, 1, 1, 0, 0, 0, 1]], dtype=torch.uint8)
    assert pack(codes, 1).tolist() == [[0b00011001, 1]]
    assert torch.equal(unpack(pack(codes, 1), 1, 9), codes)
