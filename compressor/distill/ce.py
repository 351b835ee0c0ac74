"""Plain fine-tuning: cross entropy with the data itself, no teacher.

    L = - mean log p(answer)

over the positions that predictions.py names: next tokens, hidden tokens, tokens of an answer, or
the class of a row. Full logits never exist: the head is applied to chunks of positions
(training/losses.py).
"""

from pydantic import Field
from torch import Tensor, nn

from compressor.distill.predictions import (
    answers,
    checked_labels,
    positions_at_once,
    predictions,
    refuse_without_predictions,
)
from compressor.model.model import CLASSIFIERS, Model
from compressor.options import options
from compressor.training.losses import chunked, label_loss
from compressor.training.options import Train


@options
class Options:
    """Plain fine-tuning."""

    train: Train = Field(Train(), description="how long and how fast")
    freeze_embeddings: bool = Field(False, description="leave the token tables as they are")


def objective(options: Options, student: Model, teacher: Model | None) -> nn.Module:
    """Cross entropy of the student; the teacher is not used.

    Raises:
        CompressError: the model has no head that predicts tokens or labels.
    """
    refuse_without_predictions("distill.ce", student)
    return _CrossEntropy(student)


class _CrossEntropy(nn.Module):
    def __init__(self, student: Model) -> None:
        super().__init__()
        self.student = student  # a dataclass, not a submodule: its weights are not ours

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        student = self.student
        mask, targets = answers(student.task, batch)
        if student.task in CLASSIFIERS:
            targets = checked_labels(student, targets)
        assert targets is not None
        own = predictions(student, batch)
        return chunked(
            lambda own_NH, targets_N: label_loss(own.head(own_NH), targets_N),
            [own.states, targets],
            mask,
            positions_at_once(student),
            own.weights,
        )
