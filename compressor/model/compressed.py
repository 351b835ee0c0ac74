"""Quantized weights in the layout of the library compressed-tensors, which transformers loads.

Codes are signed there, q = code - 2^(bits-1), and so are zero points; scales are ours. A module
takes one of three forms, told by `config_groups` of config.json:

    pack-quantized   weight_packed int32 [O, ceil(I bits / 32)], weight_shape int64 [2]
    naive-quantized  weight int8 [O, I], weight_zero_point int8 [O, G]
    int-quantized    the same, and activations are rounded to 8 bits as well; where their grid is
                     static, input_scale float32 [1] and input_zero_point int8 [1]

each with weight_scale float16 [O, G]. The second form serves what transformers cannot load in the
first: embedding tables, and zero points. The library packs when a file is written; what reads it
here is numerics/packing.py, so the proof of a stage compares two independent implementations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.conv1d import turned_names
from compressor.model.layers import QuantEmbedding
from compressor.model.manifest import WeightFormat
from compressor.model.shapes import empty_model
from compressor.model.side import without_sides
from compressor.model.stored import kept_and_renamed, stored
from compressor.model.stream import Lazy
from compressor.model.tables import ROWS, QuantTable

PACKED, NAIVE, INTEGER = "pack-quantized", "naive-quantized", "int-quantized"
_TO_INT8 = 128  # 2^7, the middle of 8 bits
# transformers asks these for the weights of their Linears before it has unpacked them
_NEVER_PACKED = ("t5",)


def obstacle(module: nn.Module, formats: Mapping[str, WeightFormat]) -> CompressError | None:
    """Why plain transformers could not load a model in this layout, and what would help; or None.

    Decided by names, shapes and formats: the module may lie on the meta device, with Quant modules
    or still without them.
    """
    if type(module).__name__.startswith("QsdTransformer"):
        return CompressError(
            "transformers' layers of compressed-tensors do not sum integers, as spikes need",
            "use export.onnx, or export.safetensors, which transformers loads once "
            "compressor.model.qsd_modeling is imported",
        )
    if turned_names(type(module), module.config):
        return CompressError(
            f"compressed-tensors has no layer like those of {type(module).__name__}, which are "
            "stored with inputs first",
            "use export.safetensors or export.onnx",
        )
    unpacked = _unpacked(module, formats)
    for name, form in formats.items():
        why = _refusal(form, name in unpacked)
        if why is not None:
            return CompressError(f"compressed-tensors has no form for '{name}': {why[0]}", why[1])
    return None


def _refusal(form: WeightFormat, unpacked: bool) -> tuple[str, str] | None:
    """(what cannot be expressed, which options can)."""
    if form.side_rank is not None:
        return "it has a side path", "export.safetensors with side: drop leaves side paths out"
    if form.bits is None:
        return None
    if form.activation is not None and form.activation.get("scaled"):
        return "its inputs are multiplied at run time", "quantize with unfolded: plain"
    if form.codebook is not None:
        return (
            f"its points are a codebook ({form.codebook})",
            "quantize.rtn makes even grids, and so does quantize.distilled with bucket: group",
        )
    if form.bits < 8 and unpacked:
        return (
            f"transformers loads it with 8 bits only, not {form.bits}",
            "quantize with bits: 8, or where it is an embedding table with embeddings: false (and "
            "head: false where the two are tied)",
        )
    if form.bits < 8 and not form.symmetric:
        return (
            f"transformers does not load zero points of {form.bits} bits",
            "quantize with symmetric: true, or bits: 8",
        )
    return None


def layout(module: nn.Module, formats: Mapping[str, WeightFormat]) -> dict[str, str]:
    """How `quantized_files` stores a model, for its manifest: name [, why, instead]."""
    found = obstacle(module, formats)
    if found is None:
        return {"name": "compressed-tensors"}
    return {"name": "compress", "why": found.what, "instead": found.hint}


def quantization_config(module: nn.Module, formats: Mapping[str, WeightFormat]) -> dict[str, Any]:
    """What config.json says of the weights: one group for all modules of one kind.

    Targets are names of modules. Linears without codes are listed in `ignore`, as readers other
    than transformers want.
    """
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    unpacked = _unpacked(module, formats)
    groups: dict[str, list[str]] = {}
    schemes: dict[str, dict[str, Any]] = {}
    for name, form in formats.items():
        if form.bits is not None:
            scheme = _scheme(form, name in unpacked)
            groups.setdefault(repr(scheme), []).append(name)
            schemes[repr(scheme)] = scheme
    found = [QuantizationScheme(targets=names, **schemes[key]) for key, names in groups.items()]
    used = {str(scheme["format"]) for scheme in schemes.values()}
    linears = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    config = QuantizationConfig(
        config_groups={f"group_{number}": scheme for number, scheme in enumerate(found)},
        format=used.pop() if len(used) == 1 else "mixed-precision",
        quantization_status="compressed",  # type: ignore[arg-type]
        ignore=[name for name in linears if formats.get(name, WeightFormat()).bits is None],
    )
    return config.model_dump(mode="json", exclude_none=True)


def _scheme(form: WeightFormat, unpacked: bool) -> dict[str, Any]:
    """The arguments of a QuantizationScheme, but for its targets."""
    from compressed_tensors.quantization import QuantizationArgs

    assert form.bits is not None
    strategy = "channel" if form.group is None else "group"
    weights = QuantizationArgs(
        num_bits=form.bits,
        symmetric=form.symmetric,
        strategy=strategy,  # type: ignore[arg-type]
        group_size=form.group,
    )
    scheme: dict[str, Any] = {"weights": weights, "format": _form_of(form, unpacked)}
    if form.activation is not None:
        scheme["input_activations"] = _activation(form.activation)
    return scheme


def _activation(stated: Mapping[str, Any]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=stated["bits"],
        symmetric=stated["per"] == "token",  # theirs, by max|x| / 127.5; ours divides by 127
        strategy=stated["per"],
        dynamic=stated["dynamic"],
    )


def _form_of(form: WeightFormat, unpacked: bool) -> str:
    if form.activation is not None:
        return INTEGER
    return NAIVE if unpacked or not form.symmetric else PACKED


def _unpacked(module: Any, formats: Mapping[str, WeightFormat]) -> set[str]:
    """Names of those that cannot be packed: embeddings, and what shares their table."""
    named = dict(module.named_modules(remove_duplicate=False))
    tables = {name: named[name] for name, form in formats.items() if form.bits is not None}
    if module.config.model_type in _NEVER_PACKED:
        return set(tables)
    kinds = (nn.Embedding, QuantEmbedding)
    shared = {_table(m) for m in tables.values() if isinstance(m, kinds)}
    return {name for name, table in tables.items() if _table(table) in shared}


def _table(module: nn.Module) -> int:
    """Identity of the weight of a module, quantized or not."""
    return id(module.codes_OI if isinstance(module, QuantTable) else module.weight)


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file and what it is in memory.

    Attributes:
        name: of the tensor in memory.
        lazy: how it is written.
        read: what was read of the file -> the form that model/layers.py takes; None: a shape.
    """

    name: str
    lazy: Lazy
    read: Callable[[Tensor], Tensor] | None


def compressed_state(
    module: nn.Module, formats: Mapping[str, WeightFormat], dtype: torch.dtype
) -> dict[str, Lazy]:
    """{name in the file: tensor} of a model with Quant modules; `dtype` is that of other floats."""
    return {key: entry.lazy for key, entry in _entries(module, formats, dtype).items()}


def in_our_names(
    module: nn.Module, formats: Mapping[str, WeightFormat], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """The tensors of a file as `layers.state_from_disk` wants them: our names, our packing.

    Args:
        module: the model, with empty Quant modules.
        tensors: unread slices; what has no place in the model keeps its name.
    """
    entries = _entries(module, formats, torch.float32)
    found: dict[str, Any] = {}
    for key, tensor in tensors.items():
        entry = entries.get(key)
        if entry is None:
            found[key] = tensor
        elif entry.read is not None:
            found[entry.name] = _Slice(key, tensor, entry)
    return found


@dataclass(frozen=True)
class _Slice:
    """A tensor of the file, unread; `slice[...]` gives it as ours."""

    key: str
    unread: Any
    entry: _Entry

    def __getitem__(self, key: Any) -> Tensor:
        tensor, lazy = self.unread[...], self.entry.lazy
        quantized = not lazy.dtype.is_floating_point or lazy.dtype == torch.float16
        if tuple(tensor.shape) != lazy.shape or (quantized and tensor.dtype != lazy.dtype):
            raise CompressError(
                f"tensor '{self.key}' is {tensor.dtype} {list(tensor.shape)} where the model has "
                f"{lazy.dtype} {list(lazy.shape)}",
                "get weights, config.json and manifest.json from the same place",
            )
        assert self.entry.read is not None
        return self.entry.read(tensor)[key]


def _entries(
    module: nn.Module, formats: Mapping[str, WeightFormat], dtype: torch.dtype
) -> dict[str, _Entry]:
    """{name in the file: entry}; of tied weights transformers keeps one, of their scales all."""
    twin = empty_model(type(module), module.config)  # knows names, ties and what is renamed
    unpacked = _unpacked(module, formats)
    entries: dict[str, _Entry] = {}
    for name, tensor in without_sides(module, module.state_dict(keep_vars=True)).items():
        owner_name, _, part = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if isinstance(owner, QuantTable) and part in owner.held:
            form = _form_of(owner.format, owner_name in unpacked)
            for key, lazy, read in _parts(owner, part, form):
                entries[f"{owner_name}.{key}"] = _Entry(name, lazy, read)
        else:
            lazy = Lazy.map(partial(stored, module, dtype, name), tensor)
            entries[name] = _Entry(name, lazy, lambda t: t)
    return {key: entries[name] for key, name in kept_and_renamed(twin, entries).items()}


def _parts(
    table: QuantTable, part: str, form: str
) -> list[tuple[str, Lazy, Callable[[Tensor], Tensor] | None]]:
    """(name, how to write, how to read) of what the file holds of one part of a table."""
    bits, middle = table.bits, 2 ** (table.bits - 1)
    tensor: Tensor = getattr(table, part)
    if part == "scale_OG":
        return [("weight_scale", Lazy.map(lambda t: t, tensor), lambda t: t)]
    if part == "zero_OG":
        lazy = Lazy.map(partial(_signed, middle=middle), tensor)
        return [("weight_zero_point", lazy, partial(_unsigned, middle=middle))]
    if part == "input_scale":
        return [(part, Lazy.map(lambda t: t.reshape(1), tensor), lambda t: t.reshape(()))]
    if part == "input_zero":
        lazy = Lazy.map(lambda t: _signed(t.reshape(1), _TO_INT8), tensor)
        return [("input_zero_point", lazy, lambda t: _unsigned(t.reshape(()), _TO_INT8))]
    assert part == "codes_OI"
    if form != PACKED:
        assert bits == 8
        lazy = Lazy.map(partial(_signed, middle=_TO_INT8), tensor)
        return [("weight", lazy, partial(_unsigned, middle=_TO_INT8))]
    rows, inputs = tensor.shape
    width = -(-inputs * bits // 8)
    packed = Lazy((rows, -(-inputs * bits // 32)), torch.int32, partial(_pack, tensor, bits))
    shape = Lazy((2,), torch.int64, lambda: torch.tensor([rows, inputs]))
    return [
        # bit for bit the order of numerics/packing.py, whose rows end on a byte
        ("weight_packed", packed, lambda t: t.view(torch.uint8)[:, :width].contiguous()),
        ("weight_shape", shape, None),
    ]


def _pack(codes_OI: Tensor, bits: int) -> Tensor:
    from compressed_tensors.compressors import pack_to_int32

    parts = codes_OI.detach().split(ROWS)
    return torch.cat([pack_to_int32(_signed(c, 2 ** (bits - 1)), bits) for c in parts])


def _signed(codes: Tensor, middle: int) -> Tensor:
    return (codes.to(torch.int16) - middle).to(torch.int8)


def _unsigned(codes: Tensor, middle: int) -> Tensor:
    return (codes.to(torch.int16) + middle).to(torch.uint8)
