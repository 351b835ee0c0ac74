"""Knowledge distillation on logits (Hinton et al., arXiv 1503.02531).

    L = (1 - c) T^2 D(softmax(z_t / T), softmax(z_s / T)) + c CE

with D the forward KL by default, T = 1 and c = 0: what Minitron found best for pruned models
(arXiv 2407.14679). Positions are those of predictions.py: next tokens, hidden tokens, tokens of an
answer, or rows of a classifier. Backbones run once; both heads are applied to chunks of positions.
Legend: N positions, H width, V vocabulary or classes.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.distill.predictions import (
    CLASSIFIERS,
    answers,
    checked_labels,
    positions_at_once,
    predictions,
    refuse_without_predictions,
)
from compressor.distill.runner import refuse_other_vocabulary
from compressor.errors import CompressError
from compressor.model.model import Model
from compressor.options import options
from compressor.training.losses import chunked, divergence, label_loss
from compressor.training.options import Train


@options
class Options:
    """Distillation on logits."""

    train: Train = Field(Train(), description="how long and how fast")
    kind: Literal["forward", "reverse", "js"] = Field("forward", description="divergence")
    temperature: float = Field(1.0, gt=0, le=100, description="softens both distributions")
    ce: float = Field(0.0, ge=0, lt=1, description="share of plain cross entropy")
    freeze_embeddings: bool = Field(False, description="leave the token tables as they are")


def objective(options: Options, student: Model, teacher: Model | None) -> nn.Module:
    """Divergence between the teacher's and the student's predictions.

    Raises:
        CompressError: the models predict nothing, or different vocabularies.
    """
    assert teacher is not None
    refuse_without_predictions("distill.kd", student)
    if teacher.task != student.task:
        raise CompressError(
            f"the teacher is a {teacher.task} model, the student a {student.task} model",
            "take a teacher of the same task",
        )
    refuse_other_vocabulary(student, teacher)
    _refuse_other_classes(student, teacher)
    return _Distillation(options, student, teacher)


def _refuse_other_classes(student: Model, teacher: Model) -> None:
    mine, theirs = student.config.num_labels, teacher.config.num_labels
    if student.task in CLASSIFIERS and mine != theirs:
        raise CompressError(
            f"the teacher has {theirs} classes and the student {mine}",
            "choose a teacher of the same classes, e.g. teacher: input",
        )


class _Distillation(nn.Module):
    def __init__(self, options: Options, student: Model, teacher: Model) -> None:
        super().__init__()
        self.options, self.student, self.teacher = options, student, teacher
        self.divergence = divergence(options.kind, options.temperature)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        student, teacher, share = self.student, self.teacher, self.options.ce
        mask, targets = answers(student.task, batch)
        if share and student.task in CLASSIFIERS:
            targets = checked_labels(student, targets)
        own = predictions(student, batch)
        with torch.no_grad():
            above = predictions(teacher, batch)

        def loss(own_NH: Tensor, above_NH: Tensor, *targets_N: Tensor) -> Tensor:
            with torch.no_grad():
                above_NV = above.head(above_NH)
            own_NV = own.head(own_NH)
            loss_N = self.divergence(own_NV, above_NV)
            return (
                (1 - share) * loss_N + share * label_loss(own_NV, *targets_N) if share else loss_N
            )

        streams = [own.states, above.states]
        if share:
            assert targets is not None
            streams.append(targets)
        return chunked(loss, streams, mask, positions_at_once(student), own.weights)
