"""Codes of quantized tables in a Huffman code on disk, and back (numerics/huffman.py).

A table `<module>.codes_OI` [O, I] that gets smaller is stored as three tensors, of its codes row by
row: `.lengths` uint8 [2^bits], `.chunks` int16 [ceil(O I / 1024)] and `.stream` uint8 [bytes].
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.stored import quantized_state
from compressor.model.stream import Lazy
from compressor.model.tables import ROWS, QuantTable
from compressor.numerics.huffman import CHUNK, chunk_bits, coded_bits, decode, encode, lengths_of
from compressor.numerics.packing import pack

LENGTHS, CHUNKS, STREAM = "lengths", "chunks", "stream"
_CODES = "codes_OI"
_MORE_HEADER = 200  # bytes that two more tensors take in the header of a file


def coded_state(module: nn.Module, dtype: torch.dtype) -> dict[str, Lazy]:
    """`quantized_state`, with the codes of every table coded where that makes them smaller.

    Every table is counted once, and coded when it is written.
    """
    found: dict[str, Lazy] = {}
    for name, lazy in quantized_state(module, dtype).items():
        owner, _, part = name.rpartition(".")
        table = module.get_submodule(owner)
        if isinstance(table, QuantTable) and part == _CODES:
            parts = _parts(table)
            if sum(one.bytes for one in parts.values()) + _MORE_HEADER < lazy.bytes:
                found |= {f"{name}.{key}": one for key, one in parts.items()}
                continue
        found[name] = lazy
    return found


def _parts(table: QuantTable) -> dict[str, Lazy]:
    codes = table.codes_OI
    counts = torch.zeros(2**table.bits, dtype=torch.int64)
    for rows in codes.split(ROWS):
        counts += torch.bincount(rows.flatten(), minlength=len(counts))
    lengths = lengths_of(counts.tolist())
    size = -(-coded_bits(counts, lengths) // 8)
    chunks = -(-codes.numel() // CHUNK)
    return {
        LENGTHS: Lazy((len(lengths),), torch.uint8, lambda: lengths),
        CHUNKS: Lazy((chunks,), torch.int16, partial(chunk_bits, codes, lengths)),
        STREAM: Lazy((size,), torch.uint8, partial(encode, codes, lengths)),
    }


@dataclass(frozen=True)
class _CodedSlice:
    """Codes of a table, unread; `slice[...]` gives them packed, as an ordinary file has them."""

    name: str
    parts: Mapping[str, Any]
    table: QuantTable

    def __getitem__(self, key: Any) -> Tensor:
        bits, codes = self.table.bits, self.table.codes_OI
        lengths, chunks, stream = (self.parts[part][...] for part in (LENGTHS, CHUNKS, STREAM))
        kinds = [(t.dtype, t.dim()) for t in (lengths, chunks, stream)]
        if kinds != [(torch.uint8, 1), (torch.int16, 1), (torch.uint8, 1)]:
            raise _damaged(self.name, "its parts have other types")
        if len(lengths) != 2**bits:
            raise _damaged(self.name, f"{len(lengths)} lengths for codes of {bits} bits")
        try:
            found = decode(stream, chunks, lengths, codes.numel())
        except ValueError as error:
            raise _damaged(self.name, str(error)) from error
        rows = found.view(codes.shape).split(ROWS)
        return torch.cat([pack(each, bits) for each in rows])[key]


def packed_view(module: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The slices of a file with all codes under their own names, packed when they are read.

    Args:
        module: the model, with empty Quant modules.

    Raises:
        CompressError: parts of a table are missing; what only shows in their content is raised when
            the table is read.
    """
    found: dict[str, Any] = {}
    split: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        codes, _, part = name.rpartition(".")
        if codes.rpartition(".")[2] == _CODES and part in (LENGTHS, CHUNKS, STREAM):
            split.setdefault(codes, {})[part] = tensor
        else:
            found[name] = tensor
    modules = dict(module.named_modules(remove_duplicate=False))
    for name, parts in split.items():
        table = modules.get(name.rpartition(".")[0])
        if len(parts) < 3 or not all(math.prod(part.get_shape()) for part in parts.values()):
            raise _damaged(name, "a part of it is missing or empty")
        if isinstance(table, QuantTable):
            found[name] = _CodedSlice(name, parts, table)
        else:  # named as left over by whoever fills the model
            found[name] = parts[STREAM]
    return found


def _damaged(name: str, reason: str) -> CompressError:
    return CompressError(
        f"the coded weight '{name}' is damaged: {reason}", "export or copy the directory again"
    )
