"""GPTQ: a column is rounded, and the columns after it make up for its error.

arXiv 2210.17323 (GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers). With H = 2 X^T X / tokens and U^T U = (H + damping)^-1, U upper triangular,

    q_i = round(w_i)        w_j <- w_j - (w_i - q_i) u_ij / u_ii    for j > i

(numerics/solver.py, the solver of prune.sparsegpt). In input order, a group of inputs gets its grid
when its first column is reached, from the weights as they are by then. In the order of activations
columns go by falling diagonal of H; only the solve is permuted: groups stay where they are, with
the grids of the original weights, so that any engine can run the result.

Zeros that a pattern promised stay zero. With `sparse`, weights go in the same pass, as SparseGPT
(arXiv 2301.00774) does jointly.

Where we differ: any family; padding does not count; layers that read one input share H and U; where
H is not positive definite, damping grows tenfold and the layer is named; scales are rounded (up)
to float16 before codes are chosen. Embeddings, head and whatever else no block holds are rounded to
nearest.

Legend: O outputs, I inputs, G groups of inputs, C columns.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.model.model import Model
from compressor.model.sparse import promise, promised_zeros
from compressor.numerics.masks import group_of
from compressor.numerics.quantizer import encode
from compressor.numerics.solver import (
    Factor,
    Pick,
    factorize,
    in_blocks,
    in_groups,
    output_energy,
    solve,
)
from compressor.options import options
from compressor.prune.sparsity import SparseOptions, kept_pattern
from compressor.prune.sparsity import targets as losing
from compressor.quantize.blocks import BlockOptions, quantized_blocks
from compressor.quantize.mixed import mixed_targets
from compressor.quantize.weights import GridOptions, Target, grid_of, place, uniform, weight_of
from compressor.training.calibrated import calibration, note_damping
from compressor.training.workbench import Workbench


@options
class Options(GridOptions, BlockOptions):
    """What to quantize and how finely, and on which data."""

    order: Literal["activation", "input"] | None = Field(
        None,
        description="columns of large inputs first, or as they stand; null: activation, but input "
        "where sparse is N:M",
    )
    sparse: SparseOptions | None = Field(
        None, description="prune in the same pass: {sparsity: 0.5} or {pattern: 2:4}"
    )

    @model_validator(mode="after")
    def _groups_in_order(self) -> "Options":
        if self.order == "activation" and self._pattern is not None:
            raise ValueError(f"sparse pattern {self._pattern} needs order: input")
        return self

    @property
    def _pattern(self) -> str | None:
        """N:M, or None where nothing goes or what goes has no pattern."""
        found = None if self.sparse is None else self.sparse.pattern
        return found if found is not None and group_of(found) else None

    @property
    def by_activation(self) -> bool:
        """Whether columns of large inputs come first."""
        return self.order != "input" and self._pattern is None

    @property
    def pick(self) -> Pick | None:
        """Which weights stay; None: all."""
        if self.sparse is None:
            return None
        group = group_of(self.sparse.pattern)
        return in_blocks(self.sparse.share) if group is None else in_groups(*group)


@torch.no_grad()
def run(model: Model, options: Options, work: Workbench) -> None:
    """Quantize `model` in place; fill `model.formats` and notes["quantization"].

    Raises:
        CompressError: see weights.targets; the calibration split is empty, an input is not finite,
            or N:M does not divide a layer.
    """
    batches = calibration(options.samples, options.tokens(model.config), work)
    thinned = set() if options.sparse is None else set(losing(model, options.sparse))
    found = mixed_targets(model, options, batches)
    notes = model.notes["quantization"] = {}
    for block, inside in quantized_blocks(model, options, found, batches, work, whole=True):
        for names, h_II in block.inputs():
            order_I, ordered_II = torch.arange(len(h_II)), h_II
            if options.by_activation:
                order_I = h_II.diagonal().argsort(descending=True, stable=True)
                ordered_II = h_II[order_I][:, order_I]
            factor = factorize(ordered_II)
            note_damping(model, names, factor, work)
            for name in names:
                pick, (target, _) = options.pick if name in thinned else None, inside[name]
                notes[name] = _quantize(model, target, options, factor, order_I, pick, h_II)
                if pick is not None and options.sparse is not None:
                    had = model.formats.get(name)
                    promise(model, name, kept_pattern(had, options.sparse.pattern))


class _Columns:
    """Rounds columns in some order; the grid of a group is given, or made when it is reached."""

    def __init__(self, w_OI: Tensor, target: Target, options: GridOptions, order_I: Tensor):
        self.target, self.options = target, options
        self.inputs = order_I.tolist()
        self.group = target.group or len(self.inputs)
        self.scale_OG, self.zero_OG = grid_of(w_OI, target.bits, target.group, options)
        in_order = self.inputs == sorted(self.inputs)
        self.remade = in_order and target.group is not None
        self.span = self.group if self.remade else 1

    def begin(self, first: int, w_CO: Tensor) -> None:
        g = self.inputs[first] // self.group
        if self.remade:
            found = grid_of(w_CO.T.contiguous(), self.target.bits, None, self.options)
            self.scale_OG[:, g], self.zero_OG[:, g] = (each[:, 0] for each in found)
        self.scale_O, self.zero_O = self.scale_OG[:, g].float(), self.zero_OG[:, g].float()

    def column(self, i: int, w_O: Tensor) -> Tensor:
        code_O = (w_O / self.scale_O).round_().add_(self.zero_O).clamp_(0, 2**self.target.bits - 1)
        return code_O.sub_(self.zero_O).mul_(self.scale_O)


def _quantize(
    model: Model,
    target: Target,
    options: Options,
    factor: Factor,
    order_I: Tensor,
    pick: Pick | None,
    h_II: Tensor,
) -> dict[str, float]:
    """Solve one layer and put it in place; returns what its output lost, relative and squared."""
    w_OI, zeros_OI = weight_of(model, target.name).float(), promised_zeros(model, target.name)
    columns = _Columns(w_OI, target, options, order_I)
    stays_OI = None if zeros_OI is None else ~zeros_OI[:, order_I]
    new_OI = torch.empty_like(w_OI)
    new_OI[:, order_I] = solve(w_OI[:, order_I], factor, pick, stays_OI, columns)
    scale_OG, zero_OG = columns.scale_OG, columns.zero_OG
    parts = uniform(encode(new_OI, scale_OG, zero_OG, target.bits), scale_OG, zero_OG)
    place(model, target, parts, symmetric=options.symmetric)
    energy = output_energy(w_OI, h_II)
    return {"error": output_energy(w_OI - new_OI, h_II) / energy if energy else 0.0}
