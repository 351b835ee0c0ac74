"""What a quantized model takes: codes as they are, in a Huffman code, and on disk."""

from typing import Any

import torch

from compressor.model.model import Model
from compressor.model.saving import quantized_files
from compressor.model.tables import QuantTable
from compressor.numerics.coding import coded_bytes, huffman_bits, pooled


def sizes(model: Model) -> dict[str, Any]:
    """Sizes of a quantized model; modules that share a table count once.

    weights, buckets (scales) and float (weights that stay so) are numbers; bits and huffman_bits
    are of a weight; bytes and huffman_bytes follow the formula of arXiv 1802.05668
    (numerics/coding.py); stored_bytes are those of all tensors in the weight file.
    """
    found = [m for m in model.module.modules() if isinstance(m, QuantTable)]
    tables = list({m.codes_OI.data_ptr(): m for m in found}.values())
    weights = sum(table.codes_OI.numel() for table in tables)
    bits = sum(table.codes_OI.numel() * table.bits for table in tables)
    buckets = sum(getattr(t, t.parts[1]).numel() for t in tables)
    floats = sum(p.numel() for p in model.module.parameters())
    huffman = huffman_bits(pooled(table.codes_OI for table in tables))
    dtype = getattr(torch, model.source_dtype)
    _, state = quantized_files(model.module, model.formats, dtype)
    return {
        "weights": weights,
        "buckets": buckets,
        "float": floats,
        "bits": bits / weights,
        "huffman_bits": huffman / weights,
        "bytes": coded_bytes(floats, bits, buckets),
        "huffman_bytes": coded_bytes(floats, huffman, buckets),
        "stored_bytes": sum(lazy.bytes for lazy in state.values()),
    }
