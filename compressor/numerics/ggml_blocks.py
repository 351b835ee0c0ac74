"""Blocks of 32 weights as GGUF stores them: codes of our own grids, moved and never rounded.

    q4_0, q5_0, q8_0    w = q * d             q in [-8, 7], [-16, 15], [-128, 127]
    q4_1                w = q * d + m         q in [0, 15]

d and m are float16. Our weight is (code - zero) * scale, so the first three hold any grid whose
code - zero stays in their range, with d = scale: 2 and 3 bits and symmetric 4 bits fit q4_0, 4 bits
with zero points fit q5_0 always, symmetric 8 bits fit q8_0. q4_1 holds a grid of 4 bits with zero
points where zero * scale is a float16, which is true of few. A group is a whole number of blocks;
larger ones repeat their scale. Layouts: ggml-common.h of llama.cpp.

Legend: O outputs, I inputs, G groups, B = I / 32 blocks, q an integer of a weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32
ROWS = 1024  # of a table whose integers are made at once


@dataclass(frozen=True)
class Form:
    """A block type: range of q and bytes of a block."""

    name: str
    low: int
    high: int
    bytes: int


# from the smallest: the first that holds a table is the one to take
FORMS = (
    Form("q4_0", -8, 7, 18),
    Form("q4_1", 0, 15, 20),
    Form("q5_0", -16, 15, 22),
    Form("q8_0", -128, 127, 34),
)
BY_NAME = {form.name: form for form in FORMS}


def reach(bits: int, symmetric: bool) -> tuple[int, int]:
    """The least and the greatest code - zero that a grid can have."""
    if symmetric:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 1 - 2**bits, 2**bits - 1


def span(codes_OI: Tensor, zero_OG: Tensor) -> tuple[int, int]:
    """The least and the greatest code - zero of a table; uint8 both."""
    ends = [torch.aminmax(q) for q, _ in _integers(codes_OI, zero_OG)]
    return int(min(end.min for end in ends)), int(max(end.max for end in ends))


def holds(form: Form, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> bool:
    """Whether a block type gives every weight of a table back bit for bit."""
    if form.name == "q4_1":
        low_OG = _offset(scale_OG, zero_OG)
        exact = bool((low_OG.half().float() == low_OG).all())
        return exact and int(codes_OI.max()) <= form.high
    low, high = span(codes_OI, zero_OG)
    return form.low <= low and high <= form.high


def pack(form: Form, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
    """The blocks of a table that `holds`: uint8 [O, B * form.bytes]."""
    outputs, inputs = codes_OI.shape
    blocks = inputs // BLOCK
    d_OB = _repeat(scale_OG, blocks)
    m_OB = _repeat(_offset(scale_OG, zero_OG).half(), blocks)
    found = torch.empty(outputs, blocks, form.bytes, dtype=torch.uint8)
    start = 0
    for q_RI, codes_RI in _integers(codes_OI, zero_OG):
        rows = slice(start, start + len(q_RI))
        start = rows.stop
        head = [_as_bytes(d_OB[rows])]
        if form.name == "q4_1":
            head.append(_as_bytes(m_OB[rows]))
        code_RBi = (codes_RI if form.name == "q4_1" else q_RI - form.low).unflatten(1, (-1, BLOCK))
        found[rows] = torch.cat([*head, *_body(form, code_RBi)], dim=-1)
    return found.flatten(1)


def _body(form: Form, code_RBi: Tensor) -> list[Tensor]:
    """The bytes after d and m; codes are counted from `form.low`."""
    if form.name == "q8_0":
        return [(code_RBi + form.low).to(torch.int8).view(torch.uint8)]
    code_RBi = code_RBi.to(torch.uint8)
    low, high = code_RBi[..., : BLOCK // 2], code_RBi[..., BLOCK // 2 :]
    halves = (low & 15) | (high << 4)
    if form.name != "q5_0":
        return [halves]
    weight = 1 << torch.arange(8, dtype=torch.int16)
    fifth = ((code_RBi >> 4).unflatten(-1, (4, 8)) * weight).sum(-1).to(torch.uint8)
    return [fifth, halves]


def _integers(codes_OI: Tensor, zero_OG: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (code - zero int16, code int16) of ROWS rows at a time."""
    for codes, zero in zip(codes_OI.split(ROWS), zero_OG.split(ROWS), strict=True):
        wide = codes.to(torch.int16).unflatten(1, (zero.shape[1], -1))
        yield (wide - zero.to(torch.int16).unsqueeze(-1)).flatten(1), codes.to(torch.int16)


def _offset(scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
    """-zero * scale, exact in float32: 8 bits times 11."""
    return -zero_OG.float() * scale_OG.float()


def _repeat(value_OG: Tensor, blocks: int) -> Tensor:
    return value_OG.repeat_interleave(blocks // value_OG.shape[1], dim=1)


def _as_bytes(value_OB: Tensor) -> Tensor:
    return value_OB.contiguous().unsqueeze(-1).view(torch.uint8)
