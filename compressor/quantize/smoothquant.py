"""SmoothQuant: 8-bit weights and activations, outliers of activations moved into the weights.

arXiv 2211.10438 (SmoothQuant: Accurate and Efficient Post-Training Quantization for LLMs):

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        X' = X diag(1/s)     W' = diag(s) W

X_j is input j over all real tokens of the calibration sequences, W_j what every Linear that reads
it multiplies it by. 1/s goes into what makes the input (model/scaling.py), so it costs nothing at
run time. Then weights are rounded to 8 bits per output channel, and activations per token, per
tensor, or to a range that calibration found.

Where we differ: scales also go from the output projection of attention into the values, and from
the MLP's output into a gated or ReLU MLP, which is free since rows of weights have scales of their
own; a block is calibrated on what the quantized blocks before it give; inputs or weights that are
all zero have s = 1. Static ranges are asymmetric and unsigned. Embeddings, the head and a pooler
keep float activations.

Legend: I inputs.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.model.model import Model
from compressor.model.scaling import fold_scale, refuse_unfolded, unfolded
from compressor.numerics.ops import range_grid
from compressor.numerics.quantizer import quantize
from compressor.options import options
from compressor.quantize.activations import ACTIVATIONS, needs_channels
from compressor.quantize.rescaled import Group, RescaledOptions, calibrated_groups
from compressor.quantize.weights import place, uniform
from compressor.training.workbench import Workbench


@options
class Options(RescaledOptions):
    """How activations are smoothed and rounded, and which data decides."""

    bits: Literal[8] = Field(8, description="bits per weight")
    group: int | None = Field(None, description="null: one scale per output channel")
    symmetric: Literal[True] = Field(True, description="no zero points")
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="1: all inputs become equally large, 0: all columns of weights do",
    )
    activation: Literal["token", "tensor", "static"] = Field(
        "token",
        description="what shares a scale of activations: a token, found at run time; a tensor, "
        "found at run time, so that a row depends on its batch; or a tensor, from calibration",
    )
    unfolded: Literal["plain", "scale", "refuse"] = Field(
        "plain",
        description="layers whose inputs come from where no scale fits, as in post-norm encoders: "
        "round them without smoothing, multiply their inputs at run time, or refuse them",
    )

    @model_validator(mode="after")
    def _activation_needs_channels(self) -> "Options":
        needs_channels(self, self.activation)
        return self

    @property
    def rounded_inputs(self) -> str:
        """The same for all Linears of the blocks."""
        return self.activation

    @property
    def multiplies_inputs(self) -> bool:
        """Those of `unfolded: scale`."""
        return self.unfolded == "scale"

    @property
    def solves(self) -> bool:
        """No: extremes are enough."""
        return False


def run(model: Model, options: Options, work: Workbench) -> None:
    """Quantize `model` in place; fill `model.formats` and notes["unfolded"].

    Raises:
        CompressError: see rescaled.calibrated_groups; or a layer cannot be smoothed, and
            `unfolded` is refuse.
    """
    if options.unfolded == "refuse":
        refuse_unfolded(model)
    model.notes["unfolded"] = unfolded(model)
    for block in calibrated_groups(model, options, work, whole=False):
        chosen = [_smooth(group, options.alpha) for group in block]
        for index, group in enumerate(block):
            if group.fold is not None:
                chosen[index] = fold_scale(model, group.fold, chosen[index])
        for group, s_I in zip(block, chosen, strict=True):
            _quantize(model, group, s_I, options)


def _quantize(model: Model, group: Group, scale_I: Tensor, options: Options) -> None:
    """Round the Linears of one input, which was scaled if anything could take that."""
    activation = ACTIVATIONS[options.activation]
    assert activation is not None
    shared, s_I = {}, None if group.fold is None else scale_I
    if group.fold is None and options.unfolded == "scale":
        s_I, activation = scale_I, activation | {"scaled": True}
        shared["factor_I"] = 1 / s_I
        for _, linear in group.members:
            linear.weight.data = linear.weight * s_I
    if not activation["dynamic"]:
        shared |= _static_grid(group, s_I)
    for target, linear in group.members:
        parts = uniform(*quantize(linear.weight.detach(), target.bits, target.group, True))
        place(model, target, parts | shared, activation, symmetric=True)


def _smooth(group: Group, alpha: float) -> Tensor:
    """s_I; where query heads share a value head, of the largest input and weight among them."""
    x_I = group.range.largest_I
    w_I = torch.stack([w_OI.abs().amax(0) for w_OI in group.weights]).amax(0)
    if group.fold is not None:
        x_I, w_I = group.fold.shared(x_I, "amax"), group.fold.shared(w_I, "amax")
    s_I = x_I.pow(alpha) / w_I.pow(1 - alpha)
    return s_I.where((x_I > 0) & (w_I > 0), torch.ones_like(s_I))


def _static_grid(group: Group, s_I: Tensor | None) -> dict[str, Tensor]:
    """The grid of the whole input after it was divided by s_I."""
    low_I, high_I = group.range.low_I, group.range.high_I
    if s_I is not None:
        low_I, high_I = low_I / s_I, high_I / s_I
    scale, zero = range_grid(low_I.amin(), high_I.amax())
    return {"input_scale": scale, "input_zero": zero.to(torch.uint8)}
