"""What every quantizer of weights is told, which modules it then replaces, and how.

Norms and biases stay float. A table shared by embedding and head is quantized once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.layers import install
from compressor.model.manifest import WeightFormat
from compressor.model.model import Model
from compressor.model.sound import refuse_unsound
from compressor.model.sparse import prunable
from compressor.model.tables import QuantTable
from compressor.numerics.clipping import clipped_grid
from compressor.numerics.quantizer import encode, grid
from compressor.options import exactly_one, options
from compressor.quantize.targets import is_table, quantizable, refuse_uneven

_LARGEST = torch.finfo(torch.float16).max


@options
class Mixed:
    """A budget for codes, scales and zero points of all quantized layers together."""

    average_bits: float | None = Field(None, ge=2, le=9, description="bits per weight")
    bytes: int | None = Field(
        None,
        ge=1,
        description="bytes of all quantized layers; the layout of compressed-tensors pads rows to "
        "32 bits on top",
    )
    choices: tuple[Literal[8, 4, 3, 2], ...] = Field(
        (2, 4, 8), min_length=2, description="bits a layer may have"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> "Mixed":
        exactly_one(self, ("average_bits", "bytes"))
        if len(set(self.choices)) == 1:
            raise ValueError("choices must be at least two different numbers of bits")
        return self

    @property
    def rising(self) -> list[int]:
        """The choices, each once, the fewest bits first."""
        return sorted(set(self.choices))


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
    head: bool = Field(
        True,
        description="quantize the output projection of a language model, or the last layer of a "
        "classifier",
    )

    @property
    def row_group(self) -> int | None:
        """Inputs per scale; None where scales do not follow inputs."""
        return self.group

    # What the formats of a stage say beside bits and groups, for quantize/planned.py.

    @property
    def codebook(self) -> str | None:
        """nf4 or learned; None: a uniform grid."""
        return None

    @property
    def rounded_inputs(self) -> str:
        """How inputs of Linears are rounded, a word of quantize/activations.py."""
        return "none"

    @property
    def multiplies_inputs(self) -> bool:
        """Whether inputs that nothing can take scales of are multiplied at run time."""
        return False

    @property
    def known_beforehand(self) -> bool:
        """Whether formats follow from shapes; else weights or data have a say in them."""
        return True


@options
class GridOptions(WeightOptions):
    """How the grid of every layer is chosen, beside how fine it is."""

    clip: Literal["none", "mse"] = Field(
        "none", description="mse: give up the largest weights of a group where that helps the rest"
    )
    mixed: Mixed | None = Field(
        None, description="bits layer by layer under a budget, in place of bits"
    )
    table_bits: Literal[8, 4, 3, 2] | None = Field(
        None,
        description="bits of embedding tables and the head, which lose more by few bits than "
        "other layers; null: as bits",
    )

    @model_validator(mode="after")
    def _tables_are_there(self) -> "GridOptions":
        if self.table_bits is not None and self.mixed is not None:
            raise ValueError("mixed gives tables their bits too: leave table_bits or mixed out")
        if self.table_bits is not None and not (self.embeddings or self.head):
            raise ValueError("table_bits needs embeddings or head to be quantized")
        return self

    @property
    def known_beforehand(self) -> bool:
        """Not under a budget."""
        return self.mixed is None


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
    """The weights to quantize, in the order of the modules; see shaped_targets.

    Raises:
        CompressError: see there; a value anywhere is not finite, or a weight too large.
    """
    found = shaped_targets(model, options)
    refuse_unsound(model)
    mixed = options.mixed if isinstance(options, GridOptions) else None
    for target in found:
        fewest = target.bits if mixed is None else mixed.rising[0]
        _refuse_too_large(target.name, weight_of(model, target.name), fewest)
    return found


def shaped_targets(model: Model, options: WeightOptions) -> list[Target]:
    """What `targets` gives, from shapes alone: the model may lie on the meta device.

    Raises:
        CompressError: the group does not divide a layer's inputs, or only one of a tied embedding
            and head is to be quantized.
    """
    found = quantizable(model, options.embeddings, options.head)
    if options.uneven == "refuse":
        refuse_uneven(model, found, options.group)
    targets = []
    for names in found:
        inputs = weight_of(model, names[0]).shape[1]
        even = options.group is not None and inputs % options.group == 0
        bits = bits_of(model, names, options)
        targets.append(Target(tuple(names), bits, options.group if even else None))
    return targets


def refuse_no_tables(model: Model, options: GridOptions) -> None:
    """Raise CompressError for `table_bits` where a model has no table to quantize."""
    if options.table_bits is None:
        return
    found = quantizable(model, options.embeddings, options.head)
    if not any(is_table(model, names) for names in found):
        raise CompressError(
            f"table_bits: this {model.family.model_type} has no embedding table and no head to "
            "quantize",
            "leave table_bits out",
        )


def bits_of(model: Model, names: Sequence[str], options: WeightOptions) -> int:
    """Bits of modules that share a weight, where no budget decides."""
    own = options.table_bits if isinstance(options, GridOptions) else None
    return own if own is not None and is_table(model, names) else options.bits


def linear_targets(model: Model, targets: Iterable[Target]) -> list[Target]:
    """Those that are Linears inside a block, and can be calibrated there."""
    inside = prunable(model)
    return [target for target in targets if target.name in inside]


def weight_of(model: Model, name: str) -> Tensor:
    """A module's weight [O, I], detached."""
    weight = model.module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _refuse_too_large(name: str, w_OI: Tensor, bits: int) -> None:
    if float(w_OI.abs().max()) > _LARGEST * (2 ** (bits - 1) - 1):
        raise CompressError(
            f"the weight of '{name}' is so large that its scale overflows float16",
            "start from a sound checkpoint",
        )


def grid_of(
    w_OI: Tensor, bits: int, group: int | None, options: WeightOptions
) -> tuple[Tensor, Tensor]:
    """(scale_OG float16, zero_OG uint8), see quantizer.grid."""
    clipped = isinstance(options, GridOptions) and options.clip == "mse"
    make = clipped_grid if clipped else grid
    return make(w_OI, bits, group, options.symmetric)


def uniform(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> dict[str, Tensor]:
    """What quantizer.quantize gives, as parts of a table (model/tables.py)."""
    return {"codes_OI": codes_OI, "scale_OG": scale_OG, "zero_OG": zero_OG}


def round_to_nearest(
    model: Model,
    target: Target,
    options: WeightOptions,
    activation: dict[str, Any] | None = None,
) -> None:
    """Quantize the weight of a target as it is."""
    w_OI = weight_of(model, target.name)
    scale_OG, zero_OG = grid_of(w_OI, target.bits, target.group, options)
    parts = uniform(encode(w_OI, scale_OG, zero_OG, target.bits), scale_OG, zero_OG)
    place(model, target, parts, activation, symmetric=options.symmetric)


def takes_activation(model: Model, name: str, names: Sequence[str], bits: int) -> bool:
    """Whether inputs of a module can be rounded too; `names` are all that share its weight."""
    linear = isinstance(model.module.get_submodule(name), nn.Linear)
    return linear and len(names) == 1 and bits == 8


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
        activation: of a Linear with 8 bits that stands alone; a tied head stays weight-only, since
            integer products want another layout of the shared table.
        form: the other fields of WeightFormat.
    """
    formats = {}
    for name in target.names:
        rounds = takes_activation(model, name, target.names, target.bits)
        formats[name] = replace(
            model.formats.get(name, WeightFormat()),
            bits=target.bits,
            group=target.group,
            activation=activation if rounds else None,
            **form,
        )
    install(model.module, formats)
    table = model.module.get_submodule(target.name)
    assert isinstance(table, QuantTable)
    table.fill(**parts)
    model.formats |= formats
