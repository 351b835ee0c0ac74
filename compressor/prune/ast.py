"""Adaptive Sparse Trainer: N:M sparsity while training (arXiv 2407.20584).

    y = (m * W) x + b [+ S X x]              backward: straight through, to all of W
    W <- W - lr (g(m * W) + lambda_t (not m) * W)        lambda_t rises, then stays
    m = the N largest |W| of every M inputs, chosen again every `every` steps
    L = kl T^2 KL(p_teacher || p) + (1 - kl) CE          p = softmax(z / T) in KL

The dense weight trains on behind its mask; the pull on masked-out weights lets the mask settle,
and only at the end do they become zero. The side path (SLoRB, AST-Boosted in the paper) sums
every `side` = k inputs into one (X) and starts at what the mask takes away:

    S_OR = sum over a group of (not m) * W, divided by k (mean) or not (sum); xavier: S = 0, X drawn

Where we differ. The mask is bool and the pull has the paper's sign, unlike the GPT-2 code that was
released (training/masked_adamw.py). X is fixed unless asked for: that is the 2/k more weights of
the paper; its published runs train X as a dense matrix, which costs as much again. The mask is
also chosen after the last step and before every look at validation rows, so the model that is kept
has the masks of its own weights. Dropout is off.

The default pull is the paper's, for 124 million weights. Gradients are clipped as a whole, so those
of single weights grow as models shrink, and so must the pull: 0.1 does better on models of 0.3
and 6 million weights (docs/results/sparsity.md). Flip rates fall with the learning rate in any
case, so they do not tell.

Zeros that an earlier stage promised stay zero: such a place is never picked, and its gradient is 0.

Ablations of the paper: every: null (fixed mask), ramp: 0 (static decay), kl: 0 (no teacher).

Legend: O outputs, I inputs, R groups of inputs, G inputs of a group.
"""

from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from compressor.distill import ce, runner
from compressor.distill.logits import LogitsLoss, refuse_unlike
from compressor.distill.predictions import PREDICTING
from compressor.errors import CompressError
from compressor.model.model import Model
from compressor.model.side import attach, sides, sides_off
from compressor.model.sound import refuse_unsound
from compressor.model.sparse import broken_promise, promise, promised_zeros
from compressor.options import options
from compressor.prune.adaptive import Adaptive
from compressor.prune.side_start import Start, refuse_sides, side_of
from compressor.prune.sparsity import SparseOptions, kept_pattern, targets
from compressor.training import metrics
from compressor.training.learners import parameter_groups
from compressor.training.masked_adamw import DecayForm, MaskedAdamW
from compressor.training.options import Train
from compressor.training.parallel import team
from compressor.training.straight_through import Masked, make_hard, mask_weight
from compressor.training.validation import validation_batches, validation_loss
from compressor.training.workbench import Workbench


@options
class Options(SparseOptions):
    """Adaptive sparse training."""

    pattern: str = Field(
        "2:4", description="N:M: N of every M consecutive inputs stay; or unstructured"
    )
    undivided: Literal["refuse", "dense"] = Field(
        "refuse",
        description="a layer whose inputs N:M or side does not divide: refuse it, or leave it "
        "dense or without side path",
    )
    train: Train = Field(Train(), description="how long and how fast")
    every: int | None = Field(
        10, ge=1, description="steps until the mask is chosen again; null: never"
    )
    decay: float = Field(1e-4, ge=0, le=1, description="pull on masked-out weights, at its highest")
    ramp: float = Field(
        0.25, ge=0, le=1, description="share of the steps in which the pull rises; 0: none"
    )
    decay_form: DecayForm = Field(
        "denominator", description="where the pull enters: beside the momentum, or the gradient"
    )
    kl: float = Field(
        0.67, ge=0, le=1, description="share of the teacher's predictions; the rest is plain CE"
    )
    temperature: float = Field(2.0, gt=0, le=100, description="softens both distributions")
    side: int | None = Field(
        None, ge=2, description="inputs per column of a low-rank side path; null: no such path"
    )
    side_projection: Literal["fixed", "trainable"] = Field(
        "fixed", description="sums of inputs, or a matrix that starts there and learns"
    )
    side_start: Start = Field("mean", description="what the side path starts from")
    freeze_embeddings: bool = Field(False, description="leave the token tables as they are")

    @model_validator(mode="after")
    def _xavier_learns(self) -> "Options":
        if self.side_start == "xavier" and self.side_projection == "fixed":
            raise ValueError("side_start xavier draws the projection; side_projection: trainable")
        return self


def objective(options: Options, student: Model, teacher: Model | None) -> nn.Module:
    """The loss of a model that is masked elsewhere; the teacher is not used where kl is 0.

    Raises:
        CompressError: the model predicts nothing, the teacher is unlike it, or a pattern or a
            side path does not fit a layer.
    """
    if student.task not in PREDICTING:
        raise CompressError(
            "prune.ast needs a model that predicts tokens or labels; this one is a "
            f"{student.task} model",
            "give a checkpoint with its head",
        )
    linears = targets(student, options)
    if options.side is not None:
        refuse_sides(student, linears, options.side, options.undivided)
    if options.kl == 0:
        return ce.objective(ce.Options(), student, None)
    assert teacher is not None
    refuse_unlike("prune.ast", student, teacher, "forward", None, None)
    shares = (options.kl, 1 - options.kl)
    return LogitsLoss(student, teacher, "forward", options.temperature, *shares)


def run(model: Model, options: Options, work: Workbench) -> None:
    """Train `model` sparse, in place; notes get loss, flip_rate and, with side paths, both losses.

    Raises:
        CompressError: the model predicts nothing, the teacher is unlike it, a pattern or a side
            path does not fit a layer, or the loss is not finite.
    """
    loss = objective(options, model, work.teacher if options.kl else None)
    linears = targets(model, options)
    refuse_unsound(model)
    masks = {
        n: Masked(m.weight, options.pattern, options.share, promised_zeros(model, n))
        for n, m in linears.items()
    }
    _add_sides(model, linears, masks, options)
    dense = {n: mask_weight(_linear(model, n), mask) for n, mask in masks.items()}
    adaptive = Adaptive(loss, [(masks[n], dense[n]) for n in masks], options.every, options.train)
    optimizer = MaskedAdamW(
        parameter_groups(model.module.parameters(), options.train.weight_decay, options.train.lr),
        {dense[n]: masks[n] for n in masks},
        options.train.betas,
        options.decay,
        options.ramp * options.train.steps,
        options.decay_form,
    )
    runner.run(model, adaptive, options, work, optimizer, adaptive.after_step)
    if team().leads:
        _note(model, adaptive, options, work)
    for name in masks:
        make_hard(_linear(model, name))
        promise(model, name, kept_pattern(model.formats.get(name), options.pattern))
    assert not broken_promise(model, model.formats)


def _linear(model: Model, name: str) -> nn.Linear:
    found = model.module.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def _add_sides(
    model: Model, linears: dict[str, nn.Linear], masks: dict[str, Masked], options: Options
) -> None:
    k = options.side
    for name, linear in linears.items():
        if k is not None and linear.in_features % k == 0:
            pruned_OI = linear.weight.detach() * ~masks[name].mask_OI
            learns = options.side_projection == "trainable"
            attach(model, name, side_of(pruned_OI, k, options.side_start, learns))


def _note(model: Model, adaptive: Adaptive, options: Options, work: Workbench) -> None:
    model.notes["flip_rate"] = metrics.curve(work.scratch, "flip_rate")
    if "validation" in model.notes and sides(model.module):
        with sides_off(model.module):
            found = validation_loss(adaptive, validation_batches(options.train, work), work)
        without = {"after": found.loss, "parts": found.parts, "rows": found.rows}
        model.notes["validation_without_side"] = without
        work.log(f"validation without side paths: {without}")
