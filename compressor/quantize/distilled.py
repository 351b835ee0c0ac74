"""Quantized distillation: a quantized student learns from a float teacher (arXiv 1802.05668).

    w_q = Q(w);  g = dL/dw_q;  w <- step(w, g)             and w_q = Q(w) once more at the end

Q rounds a weight to a grid that its bucket spans, backward goes straight through to the full
precision copy (training/projected.py). The loss is distillation (quantize/trained.py).

bucket: group   a uniform grid with an integer zero point along the inputs of a row, the one of
                numerics/quantizer.py: every exporter of quantize.rtn takes it
bucket: flat    the paper's: `group` consecutive weights of the flattened tensor, all of them where
                null, with points spread evenly over [min, max] (linear, 2^bits of them), over
                [-max|w|, max|w|] (absmax) or [-|w|_2, |w|_2] (absnorm, both 2^bits - 1)

steps: learned  the step of every group is a parameter (LSQ, arXiv 1902.08153), which AdamW moves
                by about `step_lr` of the layer's mean step. Under Adam the paper's gradient scale
                matters only where gradients are clipped as a whole

The paper's preset is bits 2 or 4, bucket: flat, group: 256.

Where we differ. Scales are float16 and chosen before codes, in training as in the file, so the
loss in training is that of the file. Biases and norms stay float. Validation is always of the
quantized model, before as after. Stochastic rounding is for training; what is measured and stored
is rounded to nearest. `exact` differentiates every scaling, the released code linear alone.

`embeddings: false, head: false` leaves first and last layers float. ViT's patches, a convolution,
always are.
"""

from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from compressor.distill import runner
from compressor.model.model import Model
from compressor.numerics.buckets import even_points
from compressor.numerics.projected_codebook import Codebook
from compressor.numerics.projection import Backward, Grid, LearnedGrid, Projection, Rounding
from compressor.options import options
from compressor.quantize.trained import (
    TrainedOptions,
    distillation,
    place_all,
    stepping,
    trained_targets,
    users,
)
from compressor.quantize.weights import Target, weight_of
from compressor.training.projected import Projected
from compressor.training.workbench import Workbench

_STEP_LR = 1e-3


@options
class Options(TrainedOptions):
    """Quantized distillation."""

    rounding: Rounding = Field(
        "deterministic", description="to the nearest point, or to one of the two around at random"
    )
    backward: Backward = Field(
        "plain",
        description="gradient of the weights: as it comes; truncated, none beyond [-1, 1], where "
        "weights are cut as well; or exact, through every scale as well",
    )
    steps: Literal["minmax", "learned"] = Field(
        "minmax", description="steps of bucket: group: by the ends of a group, or learned (LSQ)"
    )
    step_lr: float = Field(
        _STEP_LR,
        gt=0,
        le=1,
        description="highest rate of learned steps, in mean steps of the layer",
    )

    @model_validator(mode="after")
    def _agree(self) -> "Options":
        if self.bucket == "group" and self.scaling != "linear":
            raise ValueError("scaling is for bucket: flat; symmetric is what bucket: group has")
        if self.bucket == "flat" and not self.symmetric:
            raise ValueError("symmetric is for bucket: group; bucket: flat has scaling")
        if self.steps == "learned" and self.bucket == "flat":
            raise ValueError("steps: learned needs bucket: group")
        if self.steps != "learned" and self.step_lr != _STEP_LR:
            raise ValueError("step_lr is for steps: learned")
        plain = self.rounding == "deterministic" and self.backward == "plain"
        if self.steps == "learned" and not plain:
            raise ValueError("steps: learned has a backward pass of its own and rounds to nearest")
        return self


def objective(options: Options, student: Model, teacher: Model | None) -> nn.Module:
    """The loss of a student that is quantized elsewhere.

    Raises:
        CompressError: see trained.distillation.
    """
    zero = options.bucket == "group" or options.scaling != "linear"
    return distillation("quantize.distilled", options, student, teacher, zero)


def run(model: Model, options: Options, work: Workbench) -> None:
    """Train `model` quantized and leave it quantized; notes get losses.

    Raises:
        CompressError: see trained.distillation and weights.targets; or the loss is not finite.
    """
    loss = objective(options, model, work.teacher)
    found = trained_targets(model, options)
    layers = [(target, _projection(model, target, options)) for target in found]
    projected = Projected(loss, [(users(model, target), p) for target, p in layers])
    learned = options.steps == "learned"
    optimizer = stepping(model, projected, options.train, options.step_lr) if learned else None
    runner.run(model, projected, options, work, optimizer)
    place_all(model, layers)


def _projection(model: Model, target: Target, options: Options) -> Projection:
    bits, rounding, backward = target.bits, options.rounding, options.backward
    if options.bucket == "flat":
        points_P, buckets = even_points(bits, options.scaling), options.buckets(target)
        return Codebook(buckets, points_P, rounding=rounding, backward=backward)
    if options.steps == "learned":
        weight = weight_of(model, target.name)
        return LearnedGrid(weight, bits, target.group, options.symmetric)
    return Grid(bits, target.group, options.symmetric, rounding, backward)
