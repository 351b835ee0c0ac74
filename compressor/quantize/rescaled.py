"""Quantization that rescales inputs first: what AWQ and SmoothQuant share.

Blocks go one after the other (quantize/blocks.py). All scales of a block are chosen on its weights
as they are, then they go into what makes the inputs (model/scaling.py), then weights are rounded.

Legend: I inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.model.model import Model
from compressor.model.moments import InputRange
from compressor.model.scaling import Fold, folds
from compressor.options import options
from compressor.quantize.blocks import BlockOptions, quantized_blocks
from compressor.quantize.weights import Target, targets
from compressor.training.calibrated import calibration
from compressor.training.workbench import Workbench


@options
class RescaledOptions(BlockOptions):
    """Those of methods that scale inputs."""


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
    found = targets(model, options)
    places = {frozenset(fold.readers): fold for fold in folds(model)}
    blocks = quantized_blocks(model, options, found, batches, work, whole, ranges=True)
    for block, inside in blocks:
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
