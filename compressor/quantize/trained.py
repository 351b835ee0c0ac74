"""What quantizers that train share: their options, which weights, the loss, and what they leave.

    L = (1 - c) T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + c CE          mean over predictions

Classes: T = 2 and c = 0.3; tokens: T = 1 and c = 0.3 (arXiv 1802.05668). KL is summed over classes
and averaged over samples (tokens); the released code averages it over classes as well, so that
its KL counts less by their number. The default teacher is the model that the run started from.

Zeros that a pattern promised are one of the points: the grid along inputs has an integer zero
point, scaling by absmax or absnorm has a point at 0. Linear scaling has none, and is refused there.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim import AdamW, Optimizer

from compressor.distill.logits import LogitsLoss, refuse_unlike
from compressor.errors import CompressError
from compressor.model.model import CLASSIFIERS, Model
from compressor.numerics.buckets import Buckets, Scaling
from compressor.numerics.projection import Projection
from compressor.options import options
from compressor.quantize.targets import quantizable, refuse_uneven
from compressor.quantize.weights import Target, WeightOptions, place, targets, weight_of
from compressor.training.learners import parameter_groups
from compressor.training.options import Train
from compressor.training.projected import Projected

_LARGEST = torch.finfo(torch.float16).max / 2  # the spread of a bucket is twice that at most


@options
class TrainedOptions(WeightOptions):
    """How finely weights are quantized, which, and how they are trained."""

    bucket: Literal["group", "flat"] = Field(
        "group", description="group: inputs of a row share a scale; flat: consecutive weights"
    )
    scaling: Scaling = Field(
        "linear", description="of buckets: by their ends, largest weight, or norm"
    )
    temperature: float | None = Field(
        None, gt=0, le=100, description="softens both distributions; null: 2 for classes, else 1"
    )
    ce: float = Field(0.3, ge=0, lt=1, description="share of plain cross entropy")
    train: Train = Field(Train(), description="how long and how fast")
    freeze_embeddings: bool = Field(False, description="leave the token tables as they are")

    @model_validator(mode="after")
    def _uneven_has_groups(self) -> "TrainedOptions":
        if self.bucket == "flat" and self.uneven != "refuse":
            raise ValueError("uneven is for bucket: group; a flat bucket divides every layer")
        return self

    @property
    def codebook(self) -> str | None:
        """Points that no uniform grid has: those of flat buckets."""
        return "learned" if self.bucket == "flat" else None

    @property
    def known_beforehand(self) -> bool:
        """Not where the weights say how many points a codebook needs."""
        return self.codebook is None

    @property
    def row_group(self) -> int | None:
        """Inputs per scale; None where scales do not follow inputs."""
        return None if self.bucket == "flat" else self.group

    def buckets(self, target: Target) -> Buckets:
        """How the weight of a target is cut and scaled."""
        return Buckets(target.group, self.bucket == "flat", self.scaling)


def distillation(
    method: str, options: TrainedOptions, student: Model, teacher: Model | None, zero: bool
) -> nn.Module:
    """The loss of a student that is quantized elsewhere; looks at names and shapes only.

    Args:
        zero: whether 0 is one of the points of every layer.

    Raises:
        CompressError: the teacher is unlike the student, a group does not divide inputs, or zeros
            of an earlier stage would not stay zeros.
    """
    assert teacher is not None
    refuse_unlike(method, student, teacher, "forward", None, None)
    names = quantizable(student, options.embeddings, options.head)
    if options.uneven == "refuse":
        refuse_uneven(student, names, options.row_group)
    sparse = [n for group in names for n in group if has_zeros(student, n)]
    if sparse and not zero:
        raise CompressError(
            f"'{sparse[0]}' has zeros of an earlier stage, and linear scaling has no point at 0",
            "scaling: absmax",
        )
    temperature = options.temperature or (2.0 if student.task in CLASSIFIERS else 1.0)
    return LogitsLoss(student, teacher, "forward", temperature, 1 - options.ce, options.ce)


def trained_targets(model: Model, options: TrainedOptions) -> list[Target]:
    """The weights to quantize; the group of a flat one is never None.

    Raises:
        CompressError: see weights.targets; or a weight is too large.
    """
    plain = WeightOptions(
        bits=options.bits,
        group=options.row_group,
        uneven=options.uneven,
        embeddings=options.embeddings,
        head=options.head,
    )
    found = targets(model, plain)
    for target in found:
        if float(weight_of(model, target.name).abs().max()) > _LARGEST:
            raise CompressError(
                f"the weight of '{target.name}' is so large that its scale overflows float16",
                "start from a sound checkpoint",
            )
    if options.bucket == "group":
        return found
    whole = options.group or 2**62
    return [replace(t, group=min(whole, weight_of(model, t.name).numel())) for t in found]


def has_zeros(model: Model, name: str) -> bool:
    """Whether a pattern says that weights of a module are zero."""
    form = model.formats.get(name)
    return form is not None and form.pattern is not None


def users(model: Model, target: Target) -> list[nn.Module]:
    """The modules of a target."""
    return [model.module.get_submodule(name) for name in target.names]


def stepping(model: Model, projected: Projected, train: Train, step_lr: float) -> Optimizer:
    """AdamW of the weights of a model and of learned steps, which have rates of their own.

    Args:
        step_lr: highest rate of steps, in mean steps of the layer.
    """
    groups = parameter_groups(model.module.parameters(), train.weight_decay, train.lr)
    for step in projected.projections.parameters():
        rate = step_lr * float(step.detach().mean())
        groups.append({"params": [step], "weight_decay": 0.0, "lr": rate})
    return AdamW(groups, lr=train.lr, betas=train.betas, eps=1e-8)


def place_all(model: Model, layers: list[tuple[Target, Projection]]) -> None:
    """Replace every target by its codes."""
    for target, projection in layers:
        place(model, target, projection.parts(weight_of(model, target.name)), **projection.form)
