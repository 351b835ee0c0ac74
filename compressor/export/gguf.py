"""GGUF for llama.cpp: our own codes in its blocks, bit for bit, or the float weights of a model.

    w = (code - zero) * scale  =  q * d          numerics/ggml_blocks.py says what holds what

Nothing is quantized again unless `requantize` asks for it. K-quants (q4_k) cannot hold our scales:
they round those to 6 bits of a scale of 256 weights. Rows are moved to where llama.cpp has
them (gguf_names.py), sizes become metadata (gguf_metadata.py), the tokenizer is written down in its
terms (gguf_tokenizer.py). The finished file is read back and every tensor compared.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compressor.engines import installed
from compressor.engines.gguf import (
    FILE,
    GgufEngine,
    open_file,
    tensors_of,
    value,
)
from compressor.engines.llama_session import bindings, k_quants
from compressor.errors import CompressError, Refused
from compressor.export.files import artifact, write_probe_of, write_side_files
from compressor.export.gguf_fit import FLOATS, block_of, refuse_formats
from compressor.export.gguf_metadata import context, extra_tensors, metadata, pooling, refuse_config
from compressor.export.gguf_names import Place, arch_of, library, places
from compressor.export.gguf_tokenizer import NONE, vocabulary
from compressor.model.manifest import Artifact, WeightFormat
from compressor.model.model import Model
from compressor.model.tables import QuantTable
from compressor.numerics.ggml_blocks import BLOCK, BY_NAME, pack
from compressor.options import options

# the number that GGUF has for files of mostly one type
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9}
_FILE_TYPES |= {"bf16": 32, "q4_k": 14}
# what a requantized weight is, in our terms
_REQUANTIZED = {
    "q8_0": WeightFormat(bits=8, group=BLOCK),
    "q5_0": WeightFormat(bits=5, group=BLOCK),
    "q4_0": WeightFormat(bits=4, group=BLOCK),
    "q4_k": WeightFormat(bits=4, group=BLOCK, symmetric=False, scale_dtype="6 bits x float16"),
}
_SUPER = 256  # inputs of a block of q4_k
_TABLES = ("position_embd.weight", "token_types.weight")  # llama.cpp adds them up in float32


@options
class Options:
    """How weights are stored, and whether the tokenizer goes along."""

    type: Literal["auto", "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q8_0"] = Field(
        "auto",
        description="auto: codes in the smallest block that holds them as they are, float weights "
        "in the checkpoint's dtype; a float type turns codes into floats",
    )
    requantize: Literal["q8_0", "q5_0", "q4_0", "q4_k"] | None = Field(
        None,
        description="round weights to blocks of this type, whatever they were before; q4_k is made "
        "by llama.cpp, which must be installed",
    )
    tokenizer: Literal["keep", "none"] = Field(
        "keep", description="none: a file for token ids only (no_vocab)"
    )


@dataclass(frozen=True)
class _Plan:
    """One tensor of the file: where it comes from and how it is stored.

    Attributes:
        codes: the blocks hold the codes of a table of ours as they are.
    """

    place: Place
    kind: str
    shape: tuple[int, ...]
    codes: bool = False


def run(model: Model, options: Options, out: Path) -> Artifact:
    """Write model.gguf, config, tokenizer files and probe.

    The probe holds what the stored weights give in PyTorch: the model itself where they are the
    same bit for bit, else the file read back.

    Raises:
        CompressError: see `refuse`.
        Refused: a tensor of the finished file is not what was to be written.
    """
    refuse(model, options)
    plans = _plans(model, options)
    write_side_files(model, out)
    _write(out / FILE, model, plans, _fields(model, options, plans))
    changed = _read_back(out / FILE, model, plans)
    rounds = [name for name, form in model.formats.items() if form.activation is not None]
    reference = GgufEngine(out).model if changed or rounds else model
    write_probe_of(reference, out)
    metrics: dict[str, Any] = {
        "stored": dict(Counter(plan.kind for plan in plans.values())),
        "rounded_tensors": changed,
        "requantized": options.requantize,
        "float_activations": len(rounds),
        "tokenizer": "none" if _vocabulary(model, options) == NONE else "kept",
        "context": context(arch_of(model.family), model.config),
    }
    engine = "llama.cpp" if installed("llama.cpp") else "gguf"
    return artifact(model, out, engine, _formats(model, plans), metrics)


def refuse(model: Model, options: Options) -> None:
    """Raise CompressError where llama.cpp has no such model, tokenizer or weights.

    The model may lie on the meta device.
    """
    library()
    if options.requantize == "q4_k":
        bindings()
    refuse_config(model)
    places(model.module, model.family, model.config)
    _vocabulary(model, options)
    refuse_formats(model, options.type, options.requantize)


def _vocabulary(model: Model, options: Options) -> dict[str, Any]:
    processor = model.processor if options.tokenizer == "keep" else None
    return vocabulary(processor, model.sizes["vocabulary"])


def _plans(model: Model, options: Options) -> dict[str, _Plan]:
    """{name in the file: how it is stored}, in the order of the file."""
    found = {}
    for name, place in places(model.module, model.family, model.config).items():
        owner: Any = model.module.get_submodule(place.owner)
        is_table = isinstance(owner, QuantTable) and place.part == "weight"
        shape = tuple((owner.codes_OI if is_table else getattr(owner, place.part)).shape)
        moves = is_table and name not in _TABLES
        if moves and not options.requantize and options.type not in FLOATS:
            found[name] = _Plan(place, block_of(owner, options.type, name), shape, codes=True)
        else:
            found[name] = _Plan(place, _kind(model, options, name, shape), shape)
    return found


def _kind(model: Model, options: Options, name: str, shape: tuple[int, ...]) -> str:
    """How a tensor is stored that is not moved code by code."""
    if len(shape) != 2 or name in _TABLES:
        return "f32"
    if options.requantize and shape[1] % (_SUPER if options.requantize == "q4_k" else BLOCK) == 0:
        return options.requantize
    dtypes = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    return options.type if options.type in FLOATS else dtypes[model.source_dtype]


def _fields(model: Model, options: Options, plans: Mapping[str, _Plan]) -> dict[str, Any]:
    """All metadata of the file but its architecture."""
    weights = Counter[str]()
    for plan in plans.values():
        weights[plan.kind] += int(np.prod(plan.shape))
    return {
        "general.type": "model",
        "general.file_type": _FILE_TYPES[weights.most_common(1)[0][0]],
        "general.quantization_version": 2,
        **metadata(model.family, model.config),
        **_vocabulary(model, options),
        **pooling(model),
    }


def _write(file: Path, model: Model, plans: Mapping[str, _Plan], fields: dict[str, Any]) -> None:
    """The file, one tensor at a time."""
    gguf = library()
    writer = gguf.GGUFWriter(file, arch_of(model.family).name)
    for key, entry in fields.items():
        kind = gguf.GGUFValueType.get_type(entry)
        if kind == gguf.GGUFValueType.INT32:
            kind = gguf.GGUFValueType.UINT32  # sizes and ids
        writer.add_key_value(key, entry, kind)
    extra = extra_tensors(model.config, model.sizes["head_dim"])
    for name, tensor in extra.items():
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), tensor.nbytes)
    for name, plan in plans.items():
        number = _number(plan.kind)
        shape = gguf.quants.quant_shape_to_byte_shape(plan.shape, number)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in extra.values():
        writer.write_tensor_data(tensor.numpy())
    for name, plan in plans.items():
        writer.write_tensor_data(_bytes(model, name, plan))
    writer.close()


def _number(kind: str) -> Any:
    return library().GGMLQuantizationType[kind.upper()]


def _bytes(model: Model, name: str, plan: _Plan) -> np.ndarray:
    """What the file holds of a tensor: uint8, rows as llama.cpp has them."""
    owner, rows = model.module.get_submodule(plan.place.owner), plan.place.rows
    if plan.codes:
        assert isinstance(owner, QuantTable)
        parts = (owner.codes_OI, owner.scale_OG, owner.zero_OG)
        moved = parts if rows is None else tuple(part[rows] for part in parts)
        return pack(BY_NAME[plan.kind], *moved).numpy()
    tensor = _wanted(model, plan)
    if plan.kind == "f16" and float(tensor.abs().max()) > torch.finfo(torch.float16).max:
        raise CompressError(f"'{name}' has weights too large for float16", "--set type=bf16")
    if plan.kind == "q4_k":
        return k_quants(tensor.numpy(), int(_number("q4_k")))
    return library().quants.quantize(tensor.numpy(), _number(plan.kind)).view(np.uint8)


@torch.no_grad()
def _wanted(model: Model, plan: _Plan) -> Tensor:
    """The values that a tensor of the file should have, rows as llama.cpp has them, float32."""
    owner: Any = model.module.get_submodule(plan.place.owner)
    tensor, rows = getattr(owner, plan.place.part).detach().float(), plan.place.rows
    moved = tensor if rows is None else tensor[rows]
    return (moved + plan.place.plus if plan.place.plus else moved).contiguous()


def _read_back(file: Path, model: Model, plans: Mapping[str, _Plan]) -> int:
    """Compare every tensor of the file, dequantized by the library, with the model's.

    Returns:
        How many are not the same bit for bit, because they were rounded as asked.

    Raises:
        Refused: one differs by more than that.
    """
    stored, changed = tensors_of(open_file(file)), 0
    for name, plan in plans.items():
        found, wanted = value(stored[name]), _wanted(model, plan)
        if torch.equal(found, wanted):
            continue
        rounded = _rounded(wanted, plan)
        if rounded is None or not bool(((found - rounded[0]).abs() <= rounded[1]).all()):
            raise Refused(
                f"'{name}' of {file.name} is not the weight of '{plan.place.name}'",
                "please report it",
            )
        changed += 1
    return changed


def _rounded(wanted: Tensor, plan: _Plan) -> tuple[Tensor, Tensor | float] | None:
    """What rounding may make of a tensor, and how far off; None where nothing is rounded."""
    if plan.kind in ("f16", "bf16"):
        return wanted.to(torch.float16 if plan.kind == "f16" else torch.bfloat16).float(), 0.0
    if plan.codes or plan.kind == "f32":
        return None
    # a step of the grid, for the extreme of the side that has one code less; q4_k may clip
    most = 3 if plan.kind == "q4_k" else BY_NAME[plan.kind].high
    blocks = wanted.unflatten(1, (-1, _SUPER if plan.kind == "q4_k" else BLOCK))
    step = blocks.abs().amax(-1, keepdim=True) / most * 1.01
    return wanted, step.expand_as(blocks).flatten(1)


def _formats(model: Model, plans: Mapping[str, _Plan]) -> dict[str, WeightFormat]:
    """The formats of the artefact: of codes that were moved, of blocks that were made, of zeros."""
    by_owner = {plan.place.owner: plan for plan in plans.values() if plan.place.part == "weight"}
    tied = plans["token_embd.weight"]
    found = {}
    for name in {*model.formats, *by_owner}:
        plan = by_owner.get(name, tied)
        form = model.formats.get(name, WeightFormat())
        if not plan.codes:
            made = _REQUANTIZED.get(plan.kind, WeightFormat())
            form = replace(made, pattern=form.pattern, sparsity=form.sparsity)
        if form != WeightFormat():
            found[name] = form
    return dict(sorted(found.items()))
