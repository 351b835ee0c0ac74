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
from compressor.model.compressed_config import PACKED, form_of, unpacked_of
from compressor.model.manifest import WeightFormat
from compressor.model.shapes import empty_model
from compressor.model.side import without_sides
from compressor.model.stored import kept_and_renamed, stored
from compressor.model.stream import Lazy
from compressor.model.tables import ROWS, QuantTable

_TO_INT8 = 128  # 2^7, the middle of 8 bits


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
    unpacked = unpacked_of(module, formats)
    entries: dict[str, _Entry] = {}
    for name, tensor in without_sides(module, module.state_dict(keep_vars=True)).items():
        owner_name, _, part = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if isinstance(owner, QuantTable) and part in owner.held:
            form = form_of(owner.format, owner_name in unpacked)
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
