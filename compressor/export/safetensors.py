"""Dense safetensors that plain transformers opens: the bridge to every tool that knows no codes.

Quantized modules are written as (code - zero) * scale in `dtype`; the file says so in its
metadata, and the artefact's formats say no more than where zeros and side paths are. Float modules
are cast and nothing else. Side paths go into side.safetensors, which plain transformers does not
read: there the model computes without them, and the model card says so. `side: drop` leaves them
out for all.

With `packed`, sparse float weights are stored without their zeros (model/packed.py) in
packed.safetensors. Only compress opens that; it is the same model, bit for bit.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from compressor.errors import CompressError
from compressor.export.files import artifact, write_probe_of, write_side_files
from compressor.model.layers import QuantEmbedding, QuantLinear
from compressor.model.manifest import Artifact, WeightFormat, quantized
from compressor.model.model import Model
from compressor.model.packed import SHAPE, packed_state
from compressor.model.saving import turned_state, write_float
from compressor.model.side import beside, drop_sides, without_sides, write_sides
from compressor.model.sources import FLOAT, PACKED
from compressor.model.stored import names_on_disk, stored
from compressor.model.stream import Lazy, weight_bytes
from compressor.model.tables import QuantTable
from compressor.options import options


@options
class Options:
    """How to write the weights."""

    dtype: Literal["source", "float32", "float16", "bfloat16"] = Field(
        "source", description="dtype of the file; source: the one the checkpoint was stored in"
    )
    packed: bool = Field(
        False, description="leave out the zeros of sparse weights; only compress opens the file"
    )
    side: Literal["keep", "drop"] = Field(
        "keep", description="side paths: a file beside the weights, or left out"
    )


def run(model: Model, options: Options, out: Path) -> Artifact:
    """Write model.safetensors (in pieces when large), config, tokenizer and probe.

    With `packed` the file is packed.safetensors. The probe holds the outputs of the written,
    rounded weights computed in float32. The float weights of the model are rounded in place; a
    quantized weight is dequantized when it is used or written and dropped again, so no second
    model is ever in memory.

    Raises:
        CompressError: `packed`, and the model is quantized, not sparse, or gets no smaller.
    """
    if options.packed:
        refuse_unpackable(model.formats)
    dtype = getattr(torch, model.source_dtype if options.dtype == "source" else options.dtype)
    dropped = drop_sides(model) if options.side == "drop" else 0
    tables = {n: m for n, m in model.module.named_modules() if isinstance(m, QuantTable)}
    _round(model.module, dtype)
    for name, table in tables.items():
        model.module.set_submodule(name, _stand_in(model, table, dtype))
    write_probe_of(model, out)
    for name, table in tables.items():
        model.module.set_submodule(name, table)
    write_side_files(model, out)
    state = _dense_state(model.module, tables, dtype)
    metrics: dict[str, Any] = {"dequantized_modules": len(tables), "dropped_side_paths": dropped}
    name = FLOAT
    if options.packed:
        name, (state, metrics["packed"]) = PACKED, _packed(model, state)
    write_float(model.module, out, state, dtype, name=name)
    write_sides(model, out, dtype)
    formats = {
        name: WeightFormat(pattern=form.pattern, sparsity=form.sparsity, side_rank=form.side_rank)
        for name, form in model.formats.items()
        if form.pattern is not None or form.side_rank is not None
    }
    return artifact(model, out, "torch", formats, metrics)


def refuse_unpackable(formats: Mapping[str, WeightFormat]) -> None:
    """Raise CompressError where no weight is sparse, or the weights are codes."""
    if quantized(formats):
        raise CompressError(
            "packed leaves out the zeros of float weights, and this model is quantized",
            "leave packed out, or export the sparse stage before quantize",
        )
    if not any(form.pattern for form in formats.values()):
        raise CompressError(
            "packed leaves out the zeros of sparse weights, and no weight of this model is sparse",
            "leave packed out, or prune with a pattern (compress methods lists prune.*)",
        )


def _packed(model: Model, state: dict[str, Lazy]) -> tuple[dict[str, Lazy], dict[str, int]]:
    """`state` without the zeros of its sparse weights, and what is gained by it.

    Bytes are those of the weight files: exact, and known before anything is written.
    """
    patterns = _patterns(model)
    packed = packed_state(state, patterns)
    dense_bytes = weight_bytes(Path(FLOAT).stem, turned_state(model.module, state))
    found = {
        "weights": sum(f"{name}.{SHAPE}" in packed for name in patterns),
        "bytes": weight_bytes(Path(PACKED).stem, packed),
        "dense_bytes": dense_bytes,
    }
    if found["bytes"] >= dense_bytes:
        raise CompressError(
            f"packed would take {found['bytes']:,} bytes and dense weights {dense_bytes:,}: there "
            "are too few zeros",
            "leave packed out",
        )
    return packed, found


def _patterns(model: Model) -> dict[str, str]:
    """{name in the file: pattern} of the sparse weights."""
    patterns = {f"{name}.weight": form.pattern for name, form in model.formats.items()}
    state = without_sides(model.module, model.module.state_dict())
    named = names_on_disk(model.module, state)
    return {key: found for key, name in named.items() if (found := patterns.get(name))}


@torch.no_grad()
def _round(module: nn.Module, dtype: torch.dtype) -> None:
    """Give every float parameter a value that `dtype` can hold exactly."""
    for tensor in module.parameters():
        tensor.copy_(tensor.to(dtype))


def _stand_in(model: Model, table: QuantTable, dtype: torch.dtype) -> nn.Module:
    """What computes as the float file will; spiking layers read the weights themselves."""
    if model.family.model_type != "qsd_transformer":
        return _Dense(table, dtype)
    assert isinstance(table, QuantLinear)
    layer = nn.Linear(table.in_features, table.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(table.weight.to(dtype).float(), requires_grad=False)
    layer.register_parameter("bias", table.bias)
    return layer


class _Dense(nn.Module):
    """A table in the place of the Linear or Embedding that will be written for it."""

    def __init__(self, table: QuantTable, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.dtype = table, dtype

    @property
    def weight(self) -> Tensor:
        """For code that asks for its dtype (T5); never for values."""
        return self.table.get_buffer(self.table.parts[1]).float()

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
