"""AWQ: inputs that are large on average get finer weights, then ranges are clipped.

arXiv 2306.00978 (AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration).
For all Linears W that read one input x, with Q rounding to nearest in groups,

    s = (mean |x|)^alpha / sqrt(max s * min s)      alpha in 0, 1/20, ..., 19/20
    min over alpha of  tr(D H D^T),                 D = Q(W diag(s)) diag(1/s) - W,  H = E[2 x x^T]

the mean square change of the outputs, summed over these Linears. 1/s goes into what makes x
(model/scaling.py); where nothing can, s = 1. Then the largest size that a weight of a group may
have is shrunk to that of 1, 0.95, ..., 0.55 times it which changes the group's share of the output
least: d H_gg d^T, H_gg being the block of H on the inputs of the group. As in the reference, query
and key projections are not clipped.

Where we differ from the reference implementation: it compares outputs of attention or of the whole
MLP on the tokens themselves, we those of the Linears, from second moments, so no activation is
kept; a block is calibrated on what the quantized blocks before it give; grouped query heads get the
mean of their scales, where the reference does not scale them; inputs that are always zero have
s = 1; and scales of groups are float16, rounded up.

Legend: O outputs, I inputs, g inputs of a group, G groups of a row.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.model.families import present
from compressor.model.model import Model
from compressor.model.scaling import fold_scale
from compressor.numerics.quantizer import dequantize, encode, grid, quantize
from compressor.numerics.solver import output_energy
from compressor.options import options
from compressor.quantize.rescaled import Group, RescaledOptions, calibrated_groups
from compressor.quantize.weights import Target, place, uniform
from compressor.training.workbench import Workbench

_SMALLEST = 1e-4  # of a scale before it is normalised
_CLIPPED = 10  # ratios that are tried
_RATIO = 1 / 20  # from one to the next


@options
class Options(RescaledOptions):
    """How finely weights are quantized, what is searched, and which data decides."""

    symmetric: bool = Field(False, description="grid centred on zero, no stored zero points")
    alphas: int = Field(20, ge=1, description="exponents tried for every input; 1: no scaling")
    clip_search: bool = Field(True, description="search how far the range of each group shrinks")


def run(model: Model, options: Options, work: Workbench) -> None:
    """Quantize `model` in place; fill `model.formats` and notes["awq"].

    Raises:
        CompressError: see rescaled.calibrated_groups.
    """
    unclipped = _queries_and_keys(model) if options.clip_search else set()
    model.notes["awq"] = {}
    for block in calibrated_groups(model, options, work, whole=True):
        found = [_search(group, options) for group in block]
        for index, (group, (alpha, s_I)) in enumerate(zip(block, found, strict=True)):
            if group.fold is not None:
                found[index] = alpha, fold_scale(model, group.fold, s_I)
        for group, (alpha, s_I) in zip(block, found, strict=True):
            h_II = group.h.div_(s_I[:, None] * s_I)
            for target, linear in group.members:
                clips = options.clip_search and id(linear) not in unclipped
                error = _quantize(model, target, linear, h_II, clips, options.symmetric)
                model.notes["awq"][target.name] = {"alpha": alpha, "error": error}


def _quantize(
    model: Model, target: Target, linear: nn.Linear, h_II: Tensor, clips: bool, symmetric: bool
) -> float:
    """Round a Linear whose input was scaled; returns the share of its output's energy lost."""
    w_OI = linear.weight.detach().float()
    kept_OI = _clip(w_OI, h_II, target, symmetric) if clips else w_OI
    scale_OG, zero_OG = grid(kept_OI, target.bits, target.group, symmetric)
    parts = uniform(encode(w_OI, scale_OG, zero_OG, target.bits), scale_OG, zero_OG)
    energy = output_energy(w_OI, h_II)
    lost = output_energy(dequantize(*parts.values()).sub_(w_OI), h_II)
    place(model, target, parts, symmetric=symmetric)
    return lost / energy if energy else 0.0


def _search(group: Group, options: Options) -> tuple[float, Tensor]:
    """The best exponent, and its scales [I]; exponent 0 where nothing can take scales."""
    if group.fold is None:
        return 0.0, torch.ones_like(group.mean_I)
    mean_I, weights = group.fold.shared(group.mean_I, "mean"), group.weights
    best: tuple[float, float, Tensor] | None = None
    for step in range(options.alphas):
        s_I = _scales(mean_I, step / options.alphas)
        error = 0.0
        for (target, _), w_OI in zip(group.members, weights, strict=True):
            parts = quantize(w_OI * s_I, target.bits, target.group, options.symmetric)
            error += output_energy((dequantize(*parts) / s_I).sub_(w_OI), group.h)
        if best is None or error < best[0]:
            best = error, step / options.alphas, s_I
    assert best is not None
    return best[1:]


def _scales(mean_I: Tensor, alpha: float) -> Tensor:
    s_I = mean_I.pow(alpha).clamp(min=_SMALLEST)
    s_I = s_I / (s_I.max() * s_I.min()).sqrt()
    return s_I.where(mean_I > 0, torch.ones_like(s_I))


def _clip(w_OI: Tensor, h_II: Tensor, target: Target, symmetric: bool) -> Tensor:
    """w_OI with the largest weights of each group cut to the size that costs least."""
    width = target.group or w_OI.shape[1]
    w_OGg = w_OI.unflatten(1, (-1, width))
    blocks = torch.arange(w_OI.shape[1], device=w_OI.device).view(-1, width)
    h_Ggg = h_II[blocks[:, :, None], blocks[:, None, :]]
    largest_OG = w_OGg.abs().amax(-1)
    best_OG, found_OG = torch.full_like(largest_OG, torch.inf), largest_OG.clone()
    for step in range(_CLIPPED):
        bound_OG = largest_OG * (1 - step * _RATIO)
        parts = grid(_cut(w_OGg, bound_OG), target.bits, target.group, symmetric)
        rounded_OI = dequantize(encode(w_OI, *parts, target.bits), *parts)
        d_GOg = (rounded_OI - w_OI).unflatten(1, (-1, width)).transpose(0, 1)
        error_OG = (d_GOg @ h_Ggg).mul_(d_GOg).sum(-1).T
        better_OG = error_OG < best_OG
        best_OG = error_OG.where(better_OG, best_OG)
        found_OG = bound_OG.where(better_OG, found_OG)
    return _cut(w_OGg, found_OG)


def _cut(w_OGg: Tensor, bound_OG: Tensor) -> Tensor:
    bound_OG1 = bound_OG.unsqueeze(-1)
    return torch.minimum(torch.maximum(w_OGg, -bound_OG1), bound_OG1).flatten(1)


def _queries_and_keys(model: Model) -> set[int]:
    """Identities of the Linears that make queries or keys, fused ones included."""
    found: list[Any] = []
    for stack in model.family.stacks:
        paths = [*stack.qkv[:2], *(stack.cross_qkv or ())[:2]]
        for block in model.blocks(stack):
            found += present(block, paths).values()
    return {id(linear) for linear in found}
