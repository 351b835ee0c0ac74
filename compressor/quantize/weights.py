"""What every quantizer of weights is told, which modules it then replaces, and how.

Norms and biases stay float. A table shared by embedding and head is quantized once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.layers import install
from compressor.model.manifest import WeightFormat
from compressor.model.model import Model
from compressor.model.tables import QuantTable
from compressor.options import options
from compressor.quantize.targets import quantizable, refuse_uneven

_LARGEST = torch.finfo(torch.float16).max


@options
class WeightOptions:
    """How finely weights are quantized, and which."""

    bits: Literal[8, 4, 3, 2] = Field(
        4, description="bits per weight; ONNX Runtime serves 8, 4 and 2"
    )
    group: int | None = Field(
        128, ge=2, description="inputs per scale; null: one scale per output channel"
    )
    uneven: Literal["refuse", "channel"] = Field(
        "refuse",
        description="a layer whose inputs the group does not divide: refuse it, or give it one "
        "scale per output channel",
    )
    symmetric: bool = Field(True, description="grid centred on zero, no stored zero points")
    embeddings: bool = Field(True, description="quantize embedding tables")
    head: bool = Field(True, description="quantize the output projection of a language model")

    @property
    def row_group(self) -> int | None:
        """Inputs per scale; None where scales do not follow inputs."""
        return self.group

    @property
    def quantizes_ends(self) -> tuple[bool, bool]:
        """Whether embedding tables and the output projection are quantized."""
        return self.embeddings, self.head


@dataclass(frozen=True)
class Target:
    """Modules that share one weight, and how it is to be quantized.

    Attributes:
        names: of the modules; more than one where embedding and head are tied.
        group: inputs per scale; None: one scale per row.
    """

    names: tuple[str, ...]
    bits: int
    group: int | None

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


def targets(model: Model, options: WeightOptions) -> list[Target]:
    """The weights to quantize, in the order of the modules.

    Raises:
        CompressError: the group does not divide a layer's inputs, only one of a tied embedding
            and head is to be quantized, or a weight is not finite or too large.
    """
    found = quantizable(model, options.embeddings, options.head)
    if options.uneven == "refuse":
        refuse_uneven(model, found, options.group)
    targets = []
    for names in found:
        inputs = weight_of(model, names[0]).shape[1]
        even = options.group is not None and inputs % options.group == 0
        targets.append(Target(tuple(names), options.bits, options.group if even else None))
    for target in targets:
        _refuse_unsound(target, weight_of(model, target.name))
    return targets


def linear_targets(model: Model, targets: list[Target]) -> Iterator[tuple[Target, nn.Linear]]:
    """Those that are Linears inside a block, and can be calibrated there."""
    blocks = [block for stack in model.family.stacks for block in model.blocks(stack)]
    inside = {id(m) for block in blocks for m in block.modules()}
    for target in targets:
        module = model.module.get_submodule(target.name)
        if isinstance(module, nn.Linear) and id(module) in inside:
            yield target, module


def weight_of(model: Model, name: str) -> Tensor:
    """A module's weight [O, I], detached."""
    weight = model.module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _refuse_unsound(target: Target, w_OI: Tensor) -> None:
    ends = w_OI.aminmax()  # NaN passes through, and no copy is made
    if not all(bool(end.isfinite()) for end in ends):
        raise CompressError(
            f"the weight of '{target.name}' has NaN or infinite values",
            "start from a sound checkpoint",
        )
    if float(torch.maximum(-ends.min, ends.max)) > _LARGEST * (2 ** (target.bits - 1) - 1):
        raise CompressError(
            f"the weight of '{target.name}' is so large that its scale overflows float16",
            "start from a sound checkpoint",
        )


def place(
    model: Model,
    target: Target,
    parts: Mapping[str, Tensor],
    activation: dict[str, Any] | None = None,
    **form: Any,
) -> None:
    """Replace the modules of a target by quantized ones and note their formats.

    What pruning said about zeros and side paths is kept.

    Args:
        parts: of the table, by name (model/tables.py).
        activation: of a Linear that stands alone; a tied head stays weight-only, since integer
            products want another layout of the shared table.
        form: the other fields of WeightFormat.
    """
    formats = {}
    for name in target.names:
        alone = isinstance(model.module.get_submodule(name), nn.Linear) and len(target.names) == 1
        formats[name] = replace(
            model.formats.get(name, WeightFormat()),
            bits=target.bits,
            group=target.group,
            activation=activation if alone else None,
            **form,
        )
    install(model.module, formats)
    table = model.module.get_submodule(target.name)
    assert isinstance(table, QuantTable)
    table.fill(**parts)
    model.formats |= formats
