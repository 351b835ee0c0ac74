"""Codebook weights in ONNX: a Gather looks their points up, standard operators do the rest.

    w = points[code] * scale_b (+ offset_b)                    numerics/codebook.py

The file holds our codes, as many whole ones in a byte as fit (two of 4 bits, one of 3), and a table
of what every byte stands for, [256, codes in a byte], so that one Gather unpacks and looks up at
once. ONNX Runtime computes the weight of a Linear when it loads the file: in memory it then is
float32 (and loading takes more than that), and the layer is as fast as a float one. So a codebook
saves bytes on disk and no time; a uniform grid (quantize.rtn) saves both. Rows of an embedding are
looked up when they are asked for.

Legend: O outputs or rows, I inputs or columns, P bytes of a row, B flat buckets.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad

from compressor.model.layers import QuantEmbedding, QuantLinear
from compressor.model.side import beside
from compressor.model.tables import QuantTable
from compressor.numerics.codebook import out_of_buckets
from compressor.numerics.packing import pack


class Codebook(nn.Module):
    """A codebook table in the layout of the file; embedding and head may share one."""

    packed: Tensor
    byte_points: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, table: QuantTable) -> None:
        super().__init__()
        self.columns, self.flat = table.codes_OI.shape[1], table.flat
        whole = 8 % table.bits == 0
        bits = table.bits if whole else 8
        self.register_buffer("packed", pack(table.codes_OI, bits))  # [O, P]
        self.register_buffer("byte_points", byte_points(table.points_P, bits))
        self.register_buffer("scale", table.scale.float())
        offset = None if table.offset is None else table.offset.float()
        self.register_buffer("offset", offset)

    def _values(self, packed: Tensor) -> Tensor:
        """Points of bytes [..., P], [..., I]."""
        return embedding(packed.int(), self.byte_points).flatten(-2)[..., : self.columns]

    def weight(self) -> Tensor:
        """The whole matrix [O, I], float32."""
        values = self._values(self.packed)
        count = self.scale.shape[-1]
        if self.flat is None:
            return self._scaled(values.unflatten(-1, (count, -1)), self.scale, self.offset)
        missing = count * self.flat - values.numel()
        buckets = pad(values.reshape(-1), (0, missing)).view(count, self.flat)
        scaled = buckets * self.scale.unsqueeze(-1)
        if self.offset is not None:
            scaled = scaled + self.offset.unsqueeze(-1)
        return out_of_buckets(scaled, values.shape, self.flat)

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows [..., I]."""
        values = self._values(embedding(ids, self.packed))
        if self.flat is None:
            offset = None if self.offset is None else self.offset[ids]
            scale = self.scale[ids]
            return self._scaled(values.unflatten(-1, (scale.shape[-1], -1)), scale, offset)
        places = ids.unsqueeze(-1) * self.columns + torch.arange(self.columns)
        buckets = torch.div(places, self.flat, rounding_mode="floor")
        found = values * self.scale[buckets]
        return found if self.offset is None else found + self.offset[buckets]

    @staticmethod
    def _scaled(grouped: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        found = grouped * scale.unsqueeze(-1)
        if offset is not None:
            found = found + offset.unsqueeze(-1)
        return found.flatten(-2)


def byte_points(points_P: Tensor, bits: int) -> Tensor:
    """[256, 8 / bits]: the points that each byte stands for; codes without a point stand for 0."""
    points = pad(points_P.float(), (0, 2**bits - len(points_P)))
    bytes_ = torch.arange(256)
    places = [points[(bytes_ >> shift) & (2**bits - 1)] for shift in range(0, 8, bits)]
    return torch.stack(places, dim=-1)


class CodebookLinear(nn.Module):
    """QuantLinear with a codebook."""

    bias: nn.Parameter | None

    def __init__(self, found: QuantLinear, table: Codebook) -> None:
        super().__init__()
        self.table, self.bias, self.side = table, found.bias, found.side

    @property
    def weight(self) -> Tensor:
        """For code that asks a Linear for the dtype of its weight (T5); never for its values."""
        return self.table.scale

    def forward(self, x: Tensor) -> Tensor:
        return beside(linear(x, self.table.weight(), self.bias), self.side, x)


class CodebookEmbedding(nn.Module):
    """QuantEmbedding with a codebook."""

    def __init__(self, found: QuantEmbedding, table: Codebook) -> None:
        super().__init__()
        self.table, self.num_embeddings, self.factor = table, found.num_embeddings, found.factor

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table.rows(ids)
        return rows if self.factor == 1.0 else rows * self.factor
