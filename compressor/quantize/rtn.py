"""Round to nearest, without data: the baseline every other quantizer has to beat.

    code = clip(round(w / scale) + zero, 0, 2^bits - 1)        (numerics/quantizer.py)

w_OI is cut into groups of `group` inputs, each with its own scale. No paper claims it; Nagel et
al. (arXiv 2106.08295) is a good description. Where we differ from common practice: scales are
rounded (up) to float16 before codes are chosen, so that every file format carries the same
numbers. Norms and biases stay float. A table shared by embedding and head is quantized once.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.layers import QuantTable, install
from compressor.model.manifest import WeightFormat
from compressor.model.model import Model
from compressor.numerics.quantizer import quantize
from compressor.options import options
from compressor.quantize.targets import quantizable, refuse_uneven
from compressor.training.workbench import Workbench

_LARGEST = torch.finfo(torch.float16).max


@options
class Options:
    """What to quantize and how finely."""

    bits: Literal[8, 4] = Field(8, description="bits per weight")
    group: int | None = Field(
        32, ge=2, description="inputs per scale; null: one scale per output channel"
    )
    uneven: Literal["refuse", "channel"] = Field(
        "refuse",
        description="a layer whose inputs the group does not divide: refuse it, or give it one "
        "scale per output channel",
    )
    symmetric: bool = Field(True, description="grid centred on zero, no stored zero points")
    embeddings: bool = Field(True, description="quantize embedding tables")
    head: bool = Field(True, description="quantize the output projection of a language model")
    activation: Literal["none", "dynamic"] = Field(
        "none",
        description="dynamic: round activations to 8 bits per tensor at run time (8-bit symmetric "
        "weights, group null); fastest, but a row then depends on its batch",
    )

    @model_validator(mode="after")
    def _dynamic_needs_channels(self) -> "Options":
        if self.activation == "dynamic" and (
            self.bits != 8 or self.group is not None or not self.symmetric
        ):
            raise ValueError("activation dynamic needs bits: 8, group: null, symmetric: true")
        return self


def run(model: Model, options: Options, work: Workbench) -> None:
    """Replace Linear (and Embedding) modules by quantized ones, in place; fill `model.formats`.

    Raises:
        CompressError: a weight is not finite or too large, the group does not divide a layer's
            inputs, or only one of a tied embedding and head is to be quantized.
    """
    targets = quantizable(model, options.embeddings, options.head)
    if options.uneven == "refuse":
        refuse_uneven(model, targets, options.group)
    for names in targets:
        _check(names[0], _weight(model, names[0]), options)
    with work.progress("quantize", len(targets)) as advance:
        for names in targets:
            _quantize(model, names, options)
            advance(1)


def _weight(model: Model, name: str) -> Tensor:
    weight = model.module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _check(name: str, w_OI: Tensor, options: Options) -> None:
    if not bool(w_OI.isfinite().all()):
        raise CompressError(
            f"the weight of '{name}' has NaN or infinite values", "start from a sound checkpoint"
        )
    if float(w_OI.abs().max()) > _LARGEST * (2 ** (options.bits - 1) - 1):
        raise CompressError(
            f"the weight of '{name}' is so large that its scale overflows float16",
            "start from a sound checkpoint",
        )


def _quantize(model: Model, names: list[str], options: Options) -> None:
    w_OI, group = _weight(model, names[0]), options.group
    if group is not None and w_OI.shape[1] % group:
        group = None
    codes, scale, zero = quantize(w_OI, options.bits, group, options.symmetric)
    formats = {name: _format(model, name, options, group, len(names) > 1) for name in names}
    install(model.module, formats)
    table = model.module.get_submodule(names[0])
    assert isinstance(table, QuantTable)
    table.fill(codes, scale, zero)
    model.formats |= formats


def _format(
    model: Model, name: str, options: Options, group: int | None, tied: bool
) -> WeightFormat:
    """The format of one module; what pruning said about its zeros is kept."""
    linear = isinstance(model.module.get_submodule(name), nn.Linear)
    # A tied head stays weight-only: integer products want another layout of the shared table.
    dynamic = options.activation == "dynamic" and linear and not tied
    return replace(
        model.formats.get(name, WeightFormat()),
        bits=options.bits,
        group=group,
        symmetric=options.symmetric,
        activation={"bits": 8, "per": "tensor", "dynamic": True} if dynamic else None,
    )
