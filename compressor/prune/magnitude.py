"""Magnitude pruning, without data: the baseline every other sparse method has to beat.

    score_oi = |w_oi|

Han et al. (arXiv 1506.02626) prune by magnitude and train again; here the weights go in one shot.
The smallest go, and weights compete within their whole matrix; in N:M within each group of M
inputs. Embeddings, norms, biases and the head stay as they are.

Legend: O outputs, I inputs.
"""

import torch

from compressor.model.model import Model
from compressor.model.sparse import promise
from compressor.numerics.masks import keep_largest, share_of_zeros
from compressor.options import options
from compressor.prune.sparsity import SparseOptions, refuse_unsound, targets
from compressor.training.workbench import Workbench


@options
class Options(SparseOptions):
    """How many weights of every layer go, and in which pattern."""


@torch.no_grad()
def run(model: Model, options: Options, work: Workbench) -> None:
    """Zero the smallest weights of every layer, in place; fill `model.formats` and notes.

    Raises:
        CompressError: a weight is not finite, or N:M does not divide the inputs of a layer.
    """
    linears = targets(model, options)
    notes = model.notes["sparsity"] = {}
    with work.progress("prune", len(linears)) as advance:
        for name, linear in linears.items():
            w_OI = linear.weight
            refuse_unsound(name, w_OI)
            w_OI *= keep_largest(w_OI.abs(), options.pattern, options.share, "matrix")
            promise(model, name, options.pattern)
            notes[name] = {"sparsity": share_of_zeros(w_OI)}
            advance(1)
