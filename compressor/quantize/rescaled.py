"""Quantization that rescales inputs first: what AWQ and SmoothQuant share.

Blocks are calibrated one after the other (training/calibrated.py), each on what the quantized
blocks before it give. Inside a block the groups of Linears that read one input come backwards:
scales of an input go into what makes it, which is quantized after those who read it, with the
rows that it then has.

What stands outside the blocks (embeddings, the head, a pooler) is rounded to nearest, with the
same bits and group, before anything is measured.

Legend: I inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.model.model import Model
from compressor.model.moments import InputRange
from compressor.model.scaling import Fold, folds
from compressor.model.spill import Spill
from compressor.model.tables import QuantTable
from compressor.numerics.quantizer import quantize
from compressor.options import options
from compressor.quantize.weights import (
    Target,
    WeightOptions,
    linear_targets,
    place,
    targets,
    weight_of,
)
from compressor.training.calibrated import CalibrationOptions, calibration, watched_blocks
from compressor.training.workbench import Workbench


@options
class RescaledOptions(WeightOptions, CalibrationOptions):
    """How finely weights are quantized, and which data decides."""


@dataclass(frozen=True)
class Group:
    """Linears that read one input.

    Attributes:
        members: what is to be quantized of each, and the Linear as it is now.
        h: second moments of the input, [I, I] or the diagonal [I].
        range: its extremes, and its mean size as `mean_I`.
        fold: where scales of the input can go; None: nowhere.
    """

    members: list[tuple[Target, nn.Linear]]
    h: Tensor
    range: InputRange
    tokens: int
    fold: Fold | None

    @property
    def weights(self) -> list[Tensor]:
        """Weights [O, I] of the members, float32."""
        return [linear.weight.detach().float() for _, linear in self.members]

    @property
    def mean_I(self) -> Tensor:
        """Mean |x| of each input."""
        return self.range.size_I / self.tokens


@torch.no_grad()
def groups(model: Model, options: RescaledOptions, work: Workbench, whole: bool) -> Iterator[Group]:
    """Yield every group of every block; quantize its members before asking for the next.

    Args:
        whole: whether second moments are matrices, or their diagonals alone.

    Raises:
        CompressError: see weights.targets; or the calibration split is empty, rows are longer than
            the model takes, or an activation is not finite.
    """
    found = targets(model, options)
    inside = {target.name: (target, linear) for target, linear in linear_targets(model, found)}
    linears = {name: linear for name, (_, linear) in inside.items()}
    batches = calibration(options.samples, options.tokens(model.config), work)
    places = {frozenset(fold.readers): fold for fold in folds(model)}
    for target in found:
        if target.name not in inside:
            round_to_nearest(model, target, options.symmetric)
    spill = Spill(work.scratch) if options.offload else None
    watched = watched_blocks(model, linears, batches, work, "quantize", whole, spill, True)
    for block in watched:
        assert block.moments.ranges is not None
        for names, h in block.inputs(backwards=True):
            members = [inside[name] for name in names]
            tokens, extent = block.moments.tokens[names[0]], block.moments.ranges.pop(names[0])
            yield Group(members, h, extent, tokens, places.get(frozenset(names)))
            for name in names if spill is not None else ():
                table = model.module.get_submodule(name)
                assert isinstance(table, QuantTable) and spill is not None
                table.codes_OI = spill.store(table.codes_OI)


def round_to_nearest(model: Model, target: Target, symmetric: bool) -> None:
    """Quantize the modules of a target without data."""
    parts = quantize(weight_of(model, target.name), target.bits, target.group, symmetric)
    place(model, target, named(*parts), symmetric=symmetric)


def named(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> dict[str, Tensor]:
    """What `quantize` gives, as parts of a table."""
    return {"codes_OI": codes_OI, "scale_OG": scale_OG, "zero_OG": zero_OG}
