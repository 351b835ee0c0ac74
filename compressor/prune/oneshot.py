"""One-shot sparse pruning from calibration data, block by block: the walk that methods share.

A block is pruned with the activations that the blocks before it give *after* they were pruned.
Every layer of a block is solved from second moments of its input over the real tokens of the
calibration sequences (model/moments.py); then the block runs once more for those after it.

Legend: O outputs, I inputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.blockwise import walk
from compressor.model.model import Model
from compressor.model.moments import Moments, mask_keys
from compressor.model.sparse import promise, promised_zeros
from compressor.model.spill import Spill
from compressor.numerics.masks import share_of_zeros
from compressor.numerics.solver import output_energy
from compressor.options import options
from compressor.prune.allocation import AllocatedOptions, allocate
from compressor.prune.calibration import calibration
from compressor.prune.sparsity import kept_pattern, refuse_unsound, targets
from compressor.training.reading import most_tokens
from compressor.training.workbench import Workbench

_LENGTH = 512
# (weight [O, I], share that goes, mask of weights that may stay or None) -> the new weight [O, I]
Solve = Callable[[Tensor, float, Tensor | None], Tensor]


@options
class OneShotOptions(AllocatedOptions):
    """Which data decides, beside how many weights go."""

    samples: int = Field(128, ge=1, description="calibration sequences")
    length: int | None = Field(
        None, ge=2, description="tokens of a sequence; null: 512, or as many as the model takes"
    )
    offload: bool = Field(
        False,
        description="keep one block in memory: weights stay in files, activations are spilled to "
        "disk; for a model that is larger than memory",
    )

    @property
    def reads_data(self) -> bool:
        """Whether calibration sequences are read."""
        return True

    @property
    def solves(self) -> bool:
        """Whether whole matrices of second moments are made, and what stays is changed."""
        return True

    def tokens(self, config: Any) -> int:
        """Tokens of a sequence for a model of this config.

        Raises:
            CompressError: more are asked for than it takes.
        """
        most = most_tokens(config)
        if self.length is None:
            return _LENGTH if most is None else min(_LENGTH, most)
        if most is not None and self.length > most:
            raise CompressError(
                f"length is {self.length} and the model takes at most {most} tokens",
                f"set length to {most} or less",
            )
        return self.length


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
    linears, keys = targets(model, options), mask_keys(model)
    batches = calibration(options.samples, options.tokens(model.config), work)
    refuse_unsound(model)
    shares = allocate(model, linears, options, batches, "matrix" if whole else "row")
    masks = [{k: x for k, x in batch.items() if k in keys.values()} for batch in batches]
    model.notes["sparsity"] = {}
    spill = Spill(work.scratch) if options.offload else None
    blocks = sum(len(model.blocks(stack)) for stack in model.family.stacks)
    with work.progress("prune", blocks) as advance:
        for step in walk(model, batches, spill):
            inside = set(step.block.modules())
            own = {name: m for name, m in linears.items() if m in inside and shares[name]}
            moments = Moments(own, keys, whole)
            for i, mask in enumerate(masks):
                with moments.watching(mask):
                    step.run(i)
            for leader, names in moments.shared.items():
                h = moments.pop(leader)
                _refuse_unsound(leader, h)
                solve = prepare(names, h)
                for name in names:
                    _prune(model, name, own[name], options.pattern, shares[name], solve, h, spill)
            advance(1)


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


def _refuse_unsound(name: str, h: Tensor) -> None:
    if not bool(h.isfinite().all()):
        raise CompressError(
            f"the inputs of '{name}' have NaN or infinite values on the calibration data",
            "start from a sound checkpoint, or look for rows that upset it",
        )
