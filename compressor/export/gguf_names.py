"""Which tensor of a GGUF file is which parameter of ours, and in what order its rows lie.

Names come from the library's own map of every name that converters have met. Rows are moved, never
combined, so codes and scales move with them:

    llama     rows of query and key: [head, half, i] -> [head, i, half]      rotation in pairs
    gpt_neox  rows of the joined projection: [head, part, i] -> [part, head, i]

Norms of Gemma compute x (1 + w); the file holds 1 + w.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.engines import install_line
from compressor.errors import CompressError
from compressor.export.gguf_table import ARCHS, Arch
from compressor.model.families import Family
from compressor.model.tables import QuantTable

INSTALL = install_line("gguf")


@dataclass(frozen=True)
class Place:
    """Where a tensor of the file belongs.

    Attributes:
        owner: name of the module in memory.
        part: `weight` or `bias`.
        rows: row i of the file is row rows[i] of ours; None where they are the same.
        plus: what the file adds to every value.
    """

    owner: str
    part: str
    rows: Tensor | None = None
    plus: float = 0.0

    @property
    def name(self) -> str:
        """Name of the parameter in memory."""
        return f"{self.owner}.{self.part}"


def library() -> Any:
    """The Python package gguf.

    Raises:
        CompressError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise CompressError("GGUF files need the package gguf", INSTALL) from error


def arch_of(family: Family) -> Arch:
    """The row of a family.

    Raises:
        CompressError: there is none; names the families that have one.
    """
    if family.model_type not in ARCHS:
        raise CompressError(
            f"export.gguf has no architecture of llama.cpp for '{family.model_type}', only for "
            f"{', '.join(ARCHS)}",
            "use export.onnx or export.safetensors",
        )
    return ARCHS[family.model_type]


def places(module: nn.Module, family: Family, config: Any) -> dict[str, Place]:
    """{name in the file: Place} of every tensor; one of a tied pair unless the file needs both.

    Raises:
        CompressError: GGUF has no name for a tensor of this model.
    """
    arch, sizes = arch_of(family), family.read_sizes(config)
    gguf = library()
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch.name]
    known = gguf.get_tensor_name_map(number, sizes["layers"])
    found: dict[str, Place] = {}
    for owner, part in _parameters(module, family, arch):
        stem = known.get_name(owner)
        if stem is None:
            raise CompressError(
                f"GGUF has no name for '{owner}.{part}' of a {family.model_type} model",
                "use export.onnx or export.safetensors",
            )
        plus = 1.0 if family.norm == "rms plus one" and owner.endswith("norm") else 0.0
        found[f"{stem}.{part}"] = Place(owner, part, _order(arch, sizes, owner), plus)
    return found


def _parameters(module: nn.Module, family: Family, arch: Arch) -> Iterator[tuple[str, str]]:
    """(module name, weight or bias), without a pooler and without tied copies of a table."""
    seen: set[int] = set()
    extras = tuple(f"{name}." for name in family.extras)
    for owner, part in module.named_modules():
        if f"{owner}.".endswith(extras):
            continue
        weight = part.codes_OI if isinstance(part, QuantTable) else part._parameters.get("weight")
        if weight is not None and (id(weight) not in seen or arch.head == "must"):
            seen.add(id(weight))
            yield owner, "weight"
        if part._parameters.get("bias") is not None:
            yield owner, "bias"


def _order(arch: Arch, sizes: dict[str, int], owner: str) -> Tensor | None:
    """The order of an owner's rows in the file, for weight and bias alike."""
    width = sizes["head_dim"]
    if arch.permuted and owner.endswith(arch.permuted):
        heads = sizes["heads"] if owner.endswith(arch.permuted[0]) else sizes["kv_heads"]
        rows = torch.arange(heads * width)
        return rows.unflatten(0, (heads, 2, width // 2)).transpose(1, 2).flatten()
    if arch.joined and owner.endswith(arch.joined):
        rows = torch.arange(3 * sizes["heads"] * width)
        return rows.unflatten(0, (sizes["heads"], 3, width)).transpose(0, 1).flatten()
    return None
