"""One-shot sparse pruning from calibration data, block by block: what methods share.

Every layer is solved from the second moments of its input (training/calibrated.py).

Legend: O outputs, I inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compressor.model.model import Model
from compressor.model.sound import refuse_unsound
from compressor.model.sparse import promise, promised_zeros
from compressor.model.spill import Spill
from compressor.numerics.masks import share_of_zeros
from compressor.numerics.solver import output_energy
from compressor.options import options
from compressor.prune.allocation import AllocatedOptions, allocate
from compressor.prune.sparsity import kept_pattern, targets
from compressor.training.calibrated import CalibrationOptions, calibration, watched_blocks
from compressor.training.workbench import Workbench

# (weight [O, I], share that goes, mask of weights that may stay or None) -> the new weight [O, I]
Solve = Callable[[Tensor, float, Tensor | None], Tensor]


@options
class OneShotOptions(AllocatedOptions, CalibrationOptions):
    """Which data decides, beside how many weights go."""


@torch.no_grad()
def prune_blocks(
    model: Model,
    options: OneShotOptions,
    work: Workbench,
    whole: bool,
    prepare: Callable[[list[str], Tensor], Solve],
) -> None:
    """Prune every block in place; fill `model.formats` and notes["sparsity"].

    Args:
        whole: whether second moments are matrices [I, I], or their diagonals [I] alone.
        prepare: (names of layers that read one input, its second moments) -> how each is solved.

    Raises:
        CompressError: the calibration split is empty, rows are longer than the model takes, a
            weight or an activation is not finite, or N:M does not divide the inputs of a layer.
    """
    linears = targets(model, options)
    batches = calibration(options.samples, options.tokens(model.config), work)
    refuse_unsound(model)
    shares = allocate(model, linears, options, batches, "matrix" if whole else "row")
    losing = {name: linear for name, linear in linears.items() if shares[name]}
    model.notes["sparsity"] = {}
    spill = Spill(work.scratch) if options.offload else None
    for block in watched_blocks(model, losing, batches, work, "prune", whole, spill):
        for names, h in block.inputs():
            solve = prepare(names, h)
            for name in names:
                share = shares[name]
                _prune(model, name, losing[name], options.pattern, share, solve, h, spill)


def _prune(
    model: Model,
    name: str,
    linear: nn.Linear,
    pattern: str,
    share: float,
    solve: Solve,
    h: Tensor,
    spill: Spill | None,
) -> None:
    """Solve one layer, write it, and note what its output lost.

    tr(D H D^T) / tr(W H W^T), D the change, is the relative square error of the output where H is
    whole; its diagonal alone takes the inputs for uncorrelated and gives an estimate.
    """
    w_OI = linear.weight.detach()
    form, zeros_OI = model.formats.get(name), promised_zeros(model, name)
    new_OI = solve(w_OI, share, None if zeros_OI is None else ~zeros_OI).to(w_OI.dtype)
    energy = output_energy(w_OI, h)
    lost = output_energy(w_OI - new_OI, h) / energy if energy else 0.0
    if spill is None:
        w_OI.copy_(new_OI)
    else:
        w_OI = linear.weight.data = spill.store(new_OI)
    promise(model, name, kept_pattern(form, pattern))
    error = "error" if h.dim() == 2 else "estimated_error"
    model.notes["sparsity"][name] = {"sparsity": share_of_zeros(w_OI), error: lost}
