"""Quantize with calibration data block by block: what GPTQ, AWQ and SmoothQuant share.

What stands outside the blocks (embeddings, the head, a pooler) is rounded to nearest first. Then
blocks are calibrated one after the other (training/calibrated.py), each on what the quantized
blocks before it give. Float weights of a finished block are let go of, so that memory falls from
block to block, and with `offload` its codes go to files.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from compressor.model.model import Model
from compressor.model.sparse import prunable
from compressor.model.spill import Spill
from compressor.model.tables import QuantTable
from compressor.options import options
from compressor.quantize.weights import Target, WeightOptions, linear_targets, round_to_nearest
from compressor.training.calibrated import CalibrationOptions, Watched, watched_blocks
from compressor.training.workbench import Batch, Workbench


@options
class BlockOptions(WeightOptions, CalibrationOptions):
    """How finely weights are quantized, which, and on which data."""


def quantized_blocks(
    model: Model,
    options: BlockOptions,
    found: Sequence[Target],
    batches: Sequence[Batch],
    work: Workbench,
    whole: bool,
    ranges: bool = False,
) -> Iterator[tuple[Watched, dict[str, tuple[Target, nn.Linear]]]]:
    """Yield every block and {name: what is to be quantized, and the Linear as it is now}.

    Place all that is yielded (weights.place) before asking for the next block.

    Args:
        found: all targets, those outside the blocks too.
        batches: calibration sequences.
        whole, ranges: see watched_blocks.
    """
    inside = {target.name: target for target in linear_targets(model, found)}
    linears = {name: linear for name, linear in prunable(model).items() if name in inside}
    for target in found:
        if target.name not in inside:
            round_to_nearest(model, target, options)
    spill = Spill(work.scratch) if options.offload else None
    for block in watched_blocks(model, linears, batches, work, "quantize", whole, spill, ranges):
        yield block, {name: (inside[name], linear) for name, linear in block.linears.items()}
        for name in block.linears:
            del linears[name]  # else all float weights would stay beside their codes
            table = model.module.get_submodule(name)
            assert isinstance(table, QuantTable)
            if spill is not None:
                table.codes_OI = spill.store(table.codes_OI)
