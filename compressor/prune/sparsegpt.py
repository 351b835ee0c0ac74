"""SparseGPT: weights go where the others can make up for them, column by column.

arXiv 2301.00774 (SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot). With
H = 2 X^T X / tokens and U^T U = (H + damping)^-1, U upper triangular, weight w_oi costs

    (w_oi / u_ii)^2

and the cheapest of a block of 128 columns go, over all rows (in N:M: of each group, when its
first column is reached). What column i loses is made up for by the columns after it. The solver is
numerics/solver.py.

Where we differ: any family; padding does not count; layers that read the same input share H and
U; where H is not positive definite, damping grows tenfold and the layer is named in notes; inputs
that are always zero, whose weights go, do not count in the mean that damping is a share of.

Legend: O outputs, I inputs.
"""

from torch import Tensor

from compressor.model.model import Model
from compressor.numerics.masks import group_of
from compressor.numerics.solver import factorize, in_blocks, in_groups, solve
from compressor.options import options
from compressor.prune.oneshot import OneShotOptions, Solve, prune_blocks
from compressor.training.calibrated import note_damping
from compressor.training.workbench import Workbench


@options
class Options(OneShotOptions):
    """How many weights of every layer go, in which pattern, and on which data."""


def run(model: Model, options: Options, work: Workbench) -> None:
    """Prune `model` in place; fill `model.formats` and notes.

    Raises:
        CompressError: see prune_blocks.
    """
    group = group_of(options.pattern)

    def prepare(names: list[str], h_II: Tensor) -> Solve:
        factor = factorize(h_II)
        note_damping(model, names, factor, work)

        def one(w_OI: Tensor, share: float, held_OI: Tensor | None) -> Tensor:
            pick = in_blocks(share) if group is None else in_groups(*group)
            return solve(w_OI, factor, pick, held_OI)

        return one

    prune_blocks(model, options, work, True, prepare)
