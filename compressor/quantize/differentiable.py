"""Differentiable quantization: the points of a codebook learn, the weights stay (1802.05668).

    Q(w_i) = scale_b p_a(i) + offset_b             a(i) the nearest point of the scaled weight
    dL/dp_j = sum over i with a(i) = j of scale_b dL/dQ(w_i)

arXiv 1802.05668, its second algorithm. Every tensor has points of its own, in the space of scaled
weights, which start at their quantiles. A step moves the points, sorts them, and every weight is
assigned anew. The loss is distillation from the float model (quantize/trained.py).

Points are `2^bits` for every tensor or, with allocation: gradient, half of that and a share of the
rest in proportion to the norm of the tensor's gradient, averaged over 5 batches. So a tensor may
have any number of points from 2 to 256, and its codes take ceil(log2 n) bits.

reassign: 1 assigns weights after every step, as the paper does. The gradient knows nothing of that,
and with few points the loss may rise. With N it is done every N steps, and with null never: then
only the values of the points learn, as in Deep Compression (arXiv 1510.00149).

alternate: N trains weights for N steps by quantized distillation, straight through to the full
precision copy, then points for N steps, and so on (the paper's mixed mode, with epochs).

The paper's preset is bucket: flat, group: 256, scaling: linear, optimizer: sgd.

Where we differ. Gradients for the allocation are those of the loss where the weights are already
quantized: at the float weights a teacher of the same weights gives none, and the released code
takes plain cross entropy there. Points stay float32, scales are float16 before codes are chosen.
Adam is the default; `train.lr` is then in mean gaps between a tensor's points, and so the same for
any number of them. What an optimizer remembers of a point is sorted with it. Where a pattern of
zeros exists, scaling must be absmax, and one point is pinned at 0. Biases and norms stay float;
where `alternate` lets weights move, they move too.
"""

import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from compressor.distill import runner
from compressor.model.model import Model
from compressor.numerics.buckets import scaled, stored
from compressor.numerics.projected_codebook import Codebook
from compressor.numerics.projection import matrix
from compressor.options import options
from compressor.quantize.points import (
    InTurns,
    Start,
    mean_gap,
    shared_points,
    sort_points,
    start_points,
)
from compressor.quantize.trained import (
    TrainedOptions,
    distillation,
    has_zeros,
    place_all,
    trained_targets,
    users,
)
from compressor.quantize.weights import Target, weight_of
from compressor.training.batches import on_device
from compressor.training.learners import parameter_groups
from compressor.training.loop import NotFinite
from compressor.training.options import Train, defaulting
from compressor.training.parallel import alone
from compressor.training.projected import Projected
from compressor.training.workbench import Workbench

_BATCHES = 5  # that norms of gradients are averaged over
_WEIGHT_LR = 5e-4


@options
class Options(TrainedOptions):
    """Differentiable quantization."""

    bits: Literal[8, 4, 3, 2] = Field(
        4, description="of a code, so 2^bits points; ONNX looks them up, whatever their number"
    )
    scaling: Literal["linear", "absmax"] = Field(
        "linear", description="of buckets: by their ends, or by the largest weight"
    )
    start: Start = Field("quantiles", description="where points start")
    allocation: Literal["uniform", "gradient"] = Field(
        "uniform", description="as many points for every tensor, or more where gradients are large"
    )
    optimizer: Literal["adam", "sgd"] = Field(
        "adam", description="of the points; sgd has Nesterov's momentum 0.9"
    )
    reassign: int | None = Field(
        1, ge=1, description="steps until weights get their nearest point anew; null: never"
    )
    alternate: int | None = Field(
        None, ge=1, description="steps of weights and of points in turns; null: points only"
    )
    weight_lr: float = Field(
        _WEIGHT_LR, gt=0, le=1, description="highest rate of the weights in their turns"
    )
    train: Annotated[Train, defaulting(lr=0.01)] = Field(
        Train(lr=0.01), description="how long and how fast; lr is of points, in mean gaps for adam"
    )

    @model_validator(mode="after")
    def _agree(self) -> "Options":
        if not self.symmetric:
            raise ValueError("symmetric is said by scaling: linear has an offset, absmax none")
        if self.alternate is None and self.weight_lr != _WEIGHT_LR:
            raise ValueError("weight_lr is for alternate: without it weights do not move")
        if self.alternate is None and self.freeze_embeddings:
            raise ValueError("freeze_embeddings is for alternate: without it no weight moves")
        if self.alternate is not None and self.optimizer == "sgd":
            raise ValueError("alternate needs optimizer: adam")
        plain = Train()
        if self.optimizer == "sgd" and self.train.betas != plain.betas:
            raise ValueError("train.betas is for optimizer: adam; sgd has momentum 0.9")
        if self.alternate is not None and self.reassign != 1:
            raise ValueError("alternate moves weights, which needs reassign: 1")
        return self

    @property
    def codebook(self) -> str | None:
        """Always a learned one."""
        return "learned"


class Learned(Projected):
    """A loss of a model with codebooks whose points learn.

    Attributes:
        done: finished steps, int64.
    """

    done: Tensor

    def __init__(self, loss: nn.Module, layers: list[tuple[list[nn.Module], Codebook]]) -> None:
        super().__init__(loss, layers)
        points = [codebook.points_P for _, codebook in layers]
        self.points = [p for p in points if isinstance(p, nn.Parameter)]
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))


def objective(options: Options, student: Model, teacher: Model | None) -> nn.Module:
    """The loss of a student that is quantized elsewhere.

    Raises:
        CompressError: see trained.distillation.
    """
    zero = options.scaling != "linear"
    return distillation("quantize.differentiable", options, student, teacher, zero)


def run(model: Model, options: Options, work: Workbench) -> None:
    """Train codebooks of `model` and leave it quantized; notes get losses and points.

    Raises:
        CompressError: see trained.distillation and weights.targets; or the loss is not finite.
    """
    loss = objective(options, model, work.teacher)
    found = trained_targets(model, options)
    counts = [2**options.bits] * len(found)
    if options.allocation == "gradient":
        counts = shared_points(_gradients(model, loss, found, options, work), counts[0])
    layers = [(t, _codebook(model, t, n, options)) for t, n in zip(found, counts, strict=True)]
    learned = Learned(loss, [(users(model, target), book) for target, book in layers])
    optimizer = _optimizer(model, learned, options)

    def assign() -> None:
        sort_points(learned.points, optimizer)
        for target, book in layers if options.reassign != 1 else ():
            book.hold(weight_of(model, target.name))

    def after_step(step: int) -> None:
        if options.reassign is not None and step % options.reassign == 0:
            assign()
        learned.done.fill_(step)

    assign()

    moves = options.alternate is not None
    runner.run(model, learned, options, work, optimizer, after_step, weights=moves)
    model.notes["points"] = {t.name: n for t, n in zip(found, counts, strict=True)}
    place_all(model, [(replace(t, bits=_code_bits(b)), b) for t, b in layers])


def _code_bits(book: Codebook) -> int:
    return math.ceil(math.log2(len(book.points_P)))


def _codebook(
    model: Model, target: Target, count: int, options: Options, learns: bool = True
) -> Codebook:
    """A codebook of `count` points that fits the weight of a target."""
    buckets, pinned = options.buckets(target), has_zeros(model, target.name)
    w_Bg = buckets.cut(matrix(weight_of(model, target.name)))
    v_Bg = scaled(w_Bg, *stored(*buckets.scales(w_Bg)))
    points_P = start_points(v_Bg, count, options.start, buckets.signed, pinned)
    return Codebook(buckets, points_P, learns, pinned and learns)


def _gradients(
    model: Model, loss: nn.Module, found: list[Target], options: Options, work: Workbench
) -> list[float]:
    """Mean norm of the gradient of every target, quantized as if all had as many points.

    Raises:
        NotFinite: a norm is NaN or infinite.
    """
    train = options.train
    model.module.requires_grad_(True)
    even = [_codebook(model, t, 2**options.bits, options, learns=False) for t in found]
    layers = [(users(model, t), book) for t, book in zip(found, even, strict=True)]
    quantized = Projected(loss, layers).to(work.device)
    batches = work.batches("train", _BATCHES, batch=train.batch, length=train.length)
    norms = [0.0] * len(found)
    with alone(), work.progress("gradients", len(batches)) as advance:
        for batch in batches:
            quantized(on_device(batch, work.device)).backward()
            for index, target in enumerate(found):
                gradient = model.module.get_submodule(target.name).weight.grad
                norms[index] += float(gradient.norm()) if isinstance(gradient, Tensor) else 0.0
            model.module.zero_grad(set_to_none=True)
            advance(1)
    for target, norm in zip(found, norms, strict=True):
        if not math.isfinite(norm):
            raise NotFinite(
                f"the gradient of '{target.name}' is NaN or infinite", "allocation: uniform"
            )
    return [norm / len(batches) for norm in norms]


def _optimizer(model: Model, learned: Learned, options: Options) -> Optimizer:
    train = options.train
    if options.optimizer == "sgd":
        return SGD(learned.points, lr=train.lr, momentum=0.9, nesterov=True)
    points = [
        {"params": [points_P], "lr": train.lr * mean_gap(points_P), "weight_decay": 0.0}
        for points_P in learned.points
    ]
    if options.alternate is None:
        return Adam(points, betas=train.betas)
    weights = model.module.parameters()
    groups = parameter_groups(weights, train.weight_decay, options.weight_lr)
    return InTurns(groups, points, options.alternate, learned, train.betas)
