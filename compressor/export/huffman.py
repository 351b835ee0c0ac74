"""Quantized weights with their codes in a Huffman code: the smallest file, for compress alone.

    b = sum_s p_s l_s <= entropy + 1                          bits of a code, of symbols s

Han et al. (arXiv 1510.00149) code quantized weights in this way, as do Polino et al. (arXiv
1802.05668) for their sizes. Every table has a canonical code of its own (numerics/huffman.py,
docs/formats.md), and keeps plain packed codes where those are smaller. Scales, zero points and
float weights are stored as always; nothing is lost. Loading decodes to memory, so the model takes
no less of it and is no faster.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from compressor.errors import CompressError
from compressor.export.files import artifact, write_probe_of, write_side_files
from compressor.model.coded import STREAM, coded_state
from compressor.model.manifest import Artifact, WeightFormat, quantized
from compressor.model.model import Model
from compressor.model.saving import write_config
from compressor.model.side import write_sides
from compressor.model.sources import PACKED
from compressor.model.stored import quantized_state
from compressor.model.stream import weight_bytes, write_tensors
from compressor.options import options


@options
class Options:
    """Nothing to choose."""


def run(model: Model, options: Options, out: Path) -> Artifact:
    """Write packed.safetensors (in pieces when large), config, tokenizer and probe.

    Raises:
        CompressError: nothing is quantized, or no table gets smaller.
    """
    refuse(model.formats)
    dtype, stem = getattr(torch, model.source_dtype), Path(PACKED).stem
    state = coded_state(model.module, dtype)
    found = {
        "weights": sum(name.endswith(f".{STREAM}") for name in state),
        "bytes": weight_bytes(stem, state),
        "packed_bytes": weight_bytes(stem, quantized_state(model.module, dtype)),
    }
    if found["bytes"] >= found["packed_bytes"]:
        raise CompressError(
            f"Huffman codes would take {found['bytes']:,} bytes and plain packed codes "
            f"{found['packed_bytes']:,}: all codes occur about equally often",
            "keep the checkpoint as it is",
        )
    write_probe_of(model, out)
    write_side_files(model, out)
    write_config(model.module, out, dtype)
    write_tensors(out, stem, state)
    write_sides(model, out, dtype)
    return artifact(model, out, "torch", model.formats, {"huffman": found})


def refuse(formats: Mapping[str, WeightFormat]) -> None:
    """Raise CompressError where nothing is quantized."""
    if not quantized(formats):
        raise CompressError(
            "there are no codes to put in a Huffman code: none of this model is quantized",
            "put a quantize stage before it, or use export.safetensors",
        )
