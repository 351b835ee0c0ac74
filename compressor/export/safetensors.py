"""Dense safetensors that plain transformers opens: the bridge to every tool that knows no codes.

Quantized modules are written as (code - zero) * scale in `dtype`; the file says so in its
metadata, and the artefact has no formats. Float modules are cast and nothing else.
"""

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from compressor.export.files import write_side_files
from compressor.model.forward import outputs
from compressor.model.layers import QuantEmbedding, QuantLinear, QuantTable
from compressor.model.manifest import Artifact, Manifest
from compressor.model.model import Model
from compressor.model.probe import probe_batches, write_probe
from compressor.options import options


@options
class Options:
    """How to write the weights."""

    dtype: Literal["source", "float32", "float16", "bfloat16"] = Field(
        "source", description="dtype of the file; source: the one the checkpoint was stored in"
    )


def run(model: Model, options: Options, out: Path) -> Artifact:
    """Write model.safetensors (in pieces when large), config, tokenizer and probe.

    The probe holds the outputs of the written, rounded weights computed in float32.
    """
    dtype = getattr(torch, model.source_dtype if options.dtype == "source" else options.dtype)
    dense, quantized = _dense_copy(model, dtype)
    write_probe(out, [(batch, outputs(dense, batch)) for batch in probe_batches(model)])
    module: Any = dense.module.to(dtype)
    module.save_pretrained(out)
    write_side_files(dense, out)
    manifest = Manifest(
        kind="artifact",
        family=model.family.model_type,
        base_model={},
        engine="torch",
        metrics={"dequantized_modules": quantized},
    )
    return Artifact(out, manifest, "torch")


@torch.no_grad()
def _dense_copy(model: Model, dtype: torch.dtype) -> tuple[Model, int]:
    """A float32 copy whose values `dtype` can hold exactly, and how many modules had codes."""
    module = copy.deepcopy(model.module)
    weights: dict[int, nn.Parameter] = {}
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, QuantTable)]
    for name, table in found:
        key = table.codes_OI.data_ptr()
        if key not in weights:
            weights[key] = nn.Parameter(table.weight, requires_grad=False)
        module.set_submodule(name, _dense(table, weights[key]))
    for tensor in module.parameters():
        tensor.copy_(tensor.to(dtype))
    return Model(module, model.family, model.processor, pooling=model.pooling), len(found)


def _dense(table: QuantTable, weight: nn.Parameter) -> nn.Module:
    """The Linear or Embedding that holds `weight`; tables that were shared share it."""
    rows, columns = weight.shape
    with torch.device("meta"):
        if isinstance(table, QuantLinear):
            new: nn.Module = nn.Linear(columns, rows, bias=False)
            new.register_parameter("bias", table.bias)
        else:
            assert isinstance(table, QuantEmbedding)
            new = nn.Embedding(rows, columns)
    new.weight = weight
    return new.eval()
