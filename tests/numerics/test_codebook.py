"""Codebooks against brute force and bitsandbytes."""

import bitsandbytes.functional as bnb
import pytest
import torch

from compressor.numerics.codebook import NF4, in_buckets, lookup, nearest, out_of_buckets


def test_nearest_is_brute_force():
    values, points = torch.rand(500), torch.rand(11).sort().values
    wanted = (values[:, None] - points).abs().argmin(1)
    assert torch.equal(nearest(values, points).long(), wanted)


def test_of_equal_points_the_first_is_taken():
    points = torch.tensor([0.0, 0.5, 0.5, 1.0])
    assert nearest(torch.tensor([0.4, 0.5, 0.6]), points).tolist() == [1, 1, 2]


def test_nf4_is_that_of_bitsandbytes():
    assert torch.equal(torch.tensor(NF4), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("flat", [None, 16, 7])
@pytest.mark.parametrize("with_offset", [True, False])
def test_lookup_is_the_formula(flat, with_offset):
    codes, points = torch.randint(0, 5, (6, 8), dtype=torch.uint8), torch.rand(5)
    shape = (6, 2) if flat is None else (-(-48 // flat),)
    scale, offset = torch.rand(shape).half(), torch.rand(shape).half() if with_offset else None
    found = lookup(codes, points, scale, offset, flat)
    for o in range(6):
        for i in range(8):
            bucket = (o, i // 4) if flat is None else (o * 8 + i) // flat
            wanted = points[int(codes[o, i])] * scale[bucket].float()
            wanted = wanted + (offset[bucket].float() if offset is not None else 0)
            assert found[o, i] == wanted


@pytest.mark.parametrize("flat", [None, 16, 7])
def test_buckets_come_back(flat):
    w = torch.rand(6, 8)
    buckets = in_buckets(w, 2, flat)
    assert torch.equal(out_of_buckets(buckets, w.shape, flat), w)
    if flat == 7:  # 48 weights: the last bucket has 6 and repeats the last of them
        assert torch.equal(buckets[-1], torch.cat([w.flatten()[42:], w[-1, -1:]]))
