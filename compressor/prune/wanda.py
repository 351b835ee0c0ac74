"""Wanda: weights go by their size times that of their input; what stays is not changed.

arXiv 2306.11695 (A Simple and Effective Pruning Approach for Large Language Models):

    score_oi = |w_oi| * ||x_i||_2

x_i is input i over all real tokens of the calibration sequences. Weights compete within a row, so
every output loses as many; in N:M within each group. A block is pruned after those before it, on
what these then give. Where we differ: any family, padding does not count, and layers that read
the same input share its norms.

Legend: O outputs, I inputs.
"""

import torch
from torch import Tensor

from compressor.model.model import Model
from compressor.numerics.masks import keep_largest
from compressor.options import options
from compressor.prune.oneshot import OneShotOptions, Solve, prune_blocks
from compressor.training.workbench import Workbench


@options
class Options(OneShotOptions):
    """How many weights of every layer go, in which pattern, and on which data."""

    @property
    def solves(self) -> bool:
        """No: diagonals are enough, and what stays is not changed."""
        return False


def run(model: Model, options: Options, work: Workbench) -> None:
    """Prune `model` in place; fill `model.formats` and notes.

    Raises:
        CompressError: see prune_blocks.
    """

    def prepare(names: list[str], h_I: Tensor) -> Solve:
        norm_I = h_I.sqrt()  # of all tokens up to one factor, which no order depends on

        def solve(w_OI: Tensor, share: float, held_OI: Tensor | None) -> Tensor:
            score_OI = w_OI.float().abs() * norm_I
            if held_OI is not None:
                score_OI = score_OI.masked_fill(~held_OI, -1.0)
            mask_OI = keep_largest(score_OI, options.pattern, share, "row")
            return torch.where(mask_OI, w_OI, 0.0)  # a product would leave zeros with a sign

        return solve

    prune_blocks(model, options, work, False, prepare)
