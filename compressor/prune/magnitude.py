"""Magnitude pruning, without data: the baseline every other sparse method has to beat.

    score_oi = |w_oi|

Han et al. (arXiv 1506.02626) prune by magnitude and train again; here the weights go in one shot.
The smallest go, and weights compete within their whole matrix; in N:M within each group of M
inputs. Embeddings, norms, biases and the head stay as they are.

Legend: O outputs, I inputs.
"""

import torch

from compressor.model.model import Model
from compressor.model.sound import refuse_unsound
from compressor.model.sparse import promise
from compressor.numerics.masks import keep_largest, share_of_zeros
from compressor.options import options
from compressor.prune.allocation import AllocatedOptions, allocate
from compressor.prune.sparsity import kept_pattern, targets
from compressor.training.workbench import Workbench


@options
class Options(AllocatedOptions):
    """How many weights go, from which layers, and in which pattern."""


@torch.no_grad()
def run(model: Model, options: Options, work: Workbench) -> None:
    """Zero the smallest weights of every layer, in place; fill `model.formats` and notes.

    Raises:
        CompressError: a weight is not finite, N:M does not divide the inputs of a layer, or a glob
            of `ratios` fits none.
    """
    linears = targets(model, options)
    refuse_unsound(model)
    shares = allocate(model, linears, options)
    notes = model.notes["sparsity"] = {}
    with work.progress("prune", len(linears)) as advance:
        for name, linear in linears.items():
            w_OI = linear.weight
            if shares[name]:
                mask_OI = keep_largest(w_OI.abs(), options.pattern, shares[name], "matrix")
                w_OI.masked_fill_(~mask_OI, 0.0)  # a product would leave zeros with a sign
                promise(model, name, kept_pattern(model.formats.get(name), options.pattern))
                notes[name] = {"sparsity": share_of_zeros(w_OI)}
            advance(1)
