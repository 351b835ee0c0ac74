"""A quantized matrix: its codes, and the grid or codebook that gives them values.

    uniform     w_OI = (codes_OI - zero_OG) * scale_OG
    codebook    w_OI = points_P[codes_OI] * scale (+ offset)          numerics/codebook.py

Codes are one per byte in memory and packed on disk (numerics/packing.py). Scales are float16. The
zero point of a symmetric format, 2^(bits-1), and the points of nf4 are not stored at all.
"""

import torch
from torch import Tensor, nn

from compressor.model.manifest import WeightFormat
from compressor.numerics.codebook import NF4, lookup
from compressor.numerics.quantizer import dequantize

ROWS = 1024  # of a table that are unpacked or dequantized at once: intermediates stay small
UNIFORM = ("codes_OI", "scale_OG", "zero_OG")
CODEBOOK = ("codes_OI", "scale", "offset", "points_P")  # in rows [O, G] or flat [B]


class QuantTable(nn.Module):
    """A quantized matrix [rows, columns]; what QuantLinear and QuantEmbedding have in common.

    Attributes:
        parts: names of the buffers that make up the matrix.
        held: names of all buffers that a checkpoint holds as they are; parts, and what says how
            a QuantLinear rounds its input.
    """

    codes_OI: Tensor
    scale_OG: Tensor  # of a uniform grid
    zero_OG: Tensor
    points_P: Tensor  # of a codebook
    scale: Tensor
    offset: Tensor | None

    def __init__(self, rows: int, columns: int, form: WeightFormat) -> None:
        super().__init__()
        assert form.bits is not None
        self.format, self.bits = form, form.bits
        self.held = self.parts = UNIFORM if form.codebook is None else CODEBOOK
        self.register_buffer("codes_OI", torch.zeros(rows, columns, dtype=torch.uint8))
        groups = columns // (form.group or columns)
        if form.codebook is None:
            self.register_buffer("scale_OG", torch.ones(rows, groups, dtype=torch.float16))
            zero = torch.full((rows, groups), 2 ** (form.bits - 1), dtype=torch.uint8)
            self.register_buffer("zero_OG", zero, persistent=not form.symmetric)
            return
        self.flat = form.group if form.flat else None
        shape = (rows, groups) if self.flat is None else (-(-rows * columns // self.flat),)
        self.register_buffer("scale", torch.ones(shape, dtype=torch.float16))
        offset = None if form.symmetric else torch.zeros(shape, dtype=torch.float16)
        self.register_buffer("offset", offset)
        fixed = form.codebook == "nf4"
        points = torch.tensor(NF4) if fixed else torch.zeros(form.points or 0)
        self.register_buffer("points_P", points, persistent=not fixed)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [rows, columns], float32, made anew at every call."""
        weight = torch.empty(self.codes_OI.shape, device=self.codes_OI.device)
        step = len(weight) if self.format.flat else ROWS
        for start in range(0, len(weight), step):
            weight[start : start + step] = self.rows(slice(start, start + step))
        return weight

    def rows(self, which: slice | Tensor) -> Tensor:
        """Some rows of the weight, float32 [..., columns]."""
        codes, *grid = (getattr(self, part) for part in self.parts)
        if self.format.codebook is None:
            return dequantize(codes[which], grid[0][which], grid[1][which])
        scale, offset, points_P = grid
        if self.flat is not None:
            return lookup(codes, points_P, scale, offset, self.flat)[which]
        offset = None if offset is None else offset[which]
        return lookup(codes[which], points_P, scale[which], offset, None)

    def fill(self, **parts: Tensor) -> None:
        """Copy all that is held in, by name; whoever shares this table sees it too."""
        assert parts.keys() == {name for name in self.held if getattr(self, name) is not None}
        for name, value in parts.items():
            own = getattr(self, name)
            assert own.shape == value.shape and own.dtype == value.dtype, name
            own.copy_(value)

    def share(self, other: "QuantTable") -> None:
        """Use the table of `other` from now on."""
        assert self.parts == other.parts
        for name in self.parts:
            mine, theirs = getattr(self, name), getattr(other, name)
            assert mine is theirs is None or mine.shape == theirs.shape, name
            setattr(self, name, theirs)
