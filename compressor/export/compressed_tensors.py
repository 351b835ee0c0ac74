"""A directory in the layout of compressed-tensors: quantized weights that plain transformers loads.

The same files that a quantize stage writes where it can (model/compressed.py), as an artefact: with
a model card, and proven in the engine `transformers`, which is nothing but `from_pretrained` in
float32. What the library or transformers cannot express is refused, with what can.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from compressor.errors import CompressError
from compressor.export.files import artifact, write_probe_of, write_side_files
from compressor.model.compressed_config import obstacle
from compressor.model.manifest import Artifact, WeightFormat, quantized
from compressor.model.model import Model
from compressor.model.saving import write_quantized
from compressor.options import options


@options
class Options:
    """Nothing to choose: precision comes from the quantize stage, dtypes from the checkpoint."""


def run(model: Model, options: Options, out: Path) -> Artifact:
    """Write model.safetensors (in pieces when large), config, tokenizer and probe.

    Raises:
        CompressError: nothing is quantized, or a module has no form in this layout.
    """
    refuse(model.module, model.formats)
    write_probe_of(model, out)
    write_side_files(model, out)
    write_quantized(model.module, model.formats, out, getattr(torch, model.source_dtype))
    return artifact(model, out, "transformers", model.formats)


def refuse(module: nn.Module, formats: Mapping[str, WeightFormat]) -> None:
    """Raise CompressError where a model, which may lie on the meta device, has no such form."""
    if not quantized(formats):
        raise CompressError(
            "compressed-tensors holds quantized weights, and none of this model is quantized",
            "put a quantize stage before it, or use export.safetensors",
        )
    if found := obstacle(module, formats):
        raise found
