"""Quantization that rescales inputs first: what AWQ and SmoothQuant share.

Blocks are calibrated one after the other (training/calibrated.py), each on what the quantized
blocks before it give. All scales of a block are chosen on its weights as they are, then they go
into what makes the inputs (model/scaling.py), then weights are rounded.

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
from compressor.model.sparse import prunable
from compressor.model.spill import Spill
from compressor.model.tables import QuantTable
from compressor.options import options
from compressor.quantize.mixed import mixed_targets
from compressor.quantize.weights import (
    Target,
    WeightOptions,
    linear_targets,
    round_to_nearest,
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
        range: its extremes, and the sum of its sizes over `tokens` tokens.
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
def calibrated_groups(
    model: Model, options: RescaledOptions, work: Workbench, whole: bool
) -> Iterator[list[Group]]:
    """Yield the groups of every block; quantize all their members before asking for the next.

    Args:
        whole: whether second moments are matrices, or their diagonals alone.

    Raises:
        CompressError: see weights.targets; or the calibration split is empty, rows are longer than
            the model takes, or an activation is not finite.
    """
    batches = calibration(options.samples, options.tokens(model.config), work)
    found = mixed_targets(model, options, batches)
    own = prunable(model)
    inside = {target.name: (target, own[target.name]) for target in linear_targets(model, found)}
    linears = {name: linear for name, (_, linear) in inside.items()}
    places = {frozenset(fold.readers): fold for fold in folds(model)}
    for target in found:
        if target.name not in inside:
            round_to_nearest(model, target, options)
    spill = Spill(work.scratch) if options.offload else None
    watched = watched_blocks(model, linears, batches, work, "quantize", whole, spill, ranges=True)
    for block in watched:
        ranges, tokens = block.moments.ranges, block.moments.tokens
        assert ranges is not None
        yield [
            Group(
                [inside[name] for name in names],
                h,
                ranges[names[0]],
                tokens[names[0]],
                places.get(frozenset(names)),
            )
            for names, h in block.inputs()
        ]
        if spill is not None:
            for name in block.linears:
                table = model.module.get_submodule(name)
                assert isinstance(table, QuantTable)
                table.codes_OI = spill.store(table.codes_OI)


def named(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> dict[str, Tensor]:
    """What `quantize` gives, as parts of a table."""
    return {"codes_OI": codes_OI, "scale_OG": scale_OG, "zero_OG": zero_OG}
