"""Dense safetensors that plain transformers opens: the bridge to every tool that knows no codes.

Quantized modules are written as (code - zero) * scale in `dtype`; the file says so in its
metadata, and the artefact's formats say no more than where zeros and side paths are. Float modules
are cast and nothing else. Side paths go into side.safetensors, which plain transformers does not
read: there the model computes without them, and the model card says so. `side: drop` leaves them
out for all.
"""

from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from compressor.export.files import write_side_files
from compressor.model.checkpoint import write_float
from compressor.model.forward import outputs
from compressor.model.layers import QuantEmbedding, QuantLinear, QuantTable
from compressor.model.manifest import Artifact, Manifest, WeightFormat
from compressor.model.model import Model
from compressor.model.probe import probe_batches, write_probe
from compressor.model.side import beside, drop_sides, without_sides, write_sides
from compressor.model.stored import names_on_disk, stored
from compressor.model.stream import Lazy
from compressor.options import options


@options
class Options:
    """How to write the weights."""

    dtype: Literal["source", "float32", "float16", "bfloat16"] = Field(
        "source", description="dtype of the file; source: the one the checkpoint was stored in"
    )
    side: Literal["keep", "drop"] = Field(
        "keep", description="side paths: a file beside the weights, or left out"
    )


def run(model: Model, options: Options, out: Path) -> Artifact:
    """Write model.safetensors (in pieces when large), config, tokenizer and probe.

    The probe holds the outputs of the written, rounded weights computed in float32. The float
    weights of the model are rounded in place; a quantized weight is dequantized when it is
    used or written and dropped again, so no second model is ever in memory.
    """
    dtype = getattr(torch, model.source_dtype if options.dtype == "source" else options.dtype)
    dropped = drop_sides(model) if options.side == "drop" else 0
    tables = {n: m for n, m in model.module.named_modules() if isinstance(m, QuantTable)}
    _round(model.module, dtype)
    for name, table in tables.items():
        model.module.set_submodule(name, _Dense(table, dtype))
    write_probe(out, [(batch, outputs(model, batch)) for batch in probe_batches(model)])
    for name, table in tables.items():
        model.module.set_submodule(name, table)
    write_side_files(model, out)
    write_float(model.module, out, _dense_state(model.module, tables, dtype), dtype)
    write_sides(model, out, dtype)
    manifest = Manifest(
        kind="artifact",
        family=model.family.model_type,
        base_model={},
        engine="torch",
        formats={
            name: WeightFormat(
                pattern=form.pattern, sparsity=form.sparsity, side_rank=form.side_rank
            )
            for name, form in model.formats.items()
            if form.pattern is not None or form.side_rank is not None
        },
        metrics={"dequantized_modules": len(tables), "dropped_side_paths": dropped},
    )
    return Artifact(out, manifest, "torch")


@torch.no_grad()
def _round(module: nn.Module, dtype: torch.dtype) -> None:
    """Give every float parameter a value that `dtype` can hold exactly."""
    for tensor in module.parameters():
        tensor.copy_(tensor.to(dtype))


class _Dense(nn.Module):
    """A table in the place of the Linear or Embedding that will be written for it."""

    def __init__(self, table: QuantTable, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.dtype = table, dtype

    @property
    def weight(self) -> Tensor:
        """For code that asks for its dtype (T5); never for values."""
        return self.table.scale_OG.float()

    @property
    def num_embeddings(self) -> int:
        """Rows of the table, which Whisper asks for."""
        return self.table.codes_OI.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.table, QuantLinear):
            y = linear(x, self.table.weight.to(self.dtype).float(), self.table.bias)
            return beside(y, self.table.side, x)
        assert isinstance(self.table, QuantEmbedding)
        factor = self.table.factor  # applied to rows that were rounded as the file has them
        return (self.table(x) / factor).to(self.dtype).float() * factor


def _dense_state(
    module: nn.Module, tables: dict[str, QuantTable], dtype: torch.dtype
) -> dict[str, Lazy]:
    """What transformers would store if the tables were float weights; their codes stand in."""
    state = {f"{name}.weight": table.codes_OI for name, table in tables.items()}
    for name, tensor in without_sides(module, module.state_dict()).items():
        if name.rpartition(".")[0] not in tables or name.endswith(".bias"):
            state[name] = tensor
    found = {}
    for key, name in names_on_disk(module, state).items():
        table = tables.get(name.rpartition(".")[0])
        if table is not None and name.endswith(".weight"):
            shape = tuple(table.codes_OI.shape)
            found[key] = Lazy(shape, dtype, lambda table=table: table.weight.to(dtype))
        else:
            found[key] = Lazy.map(partial(stored, module, dtype, name), state[name])
    return found
