"""Plain fine-tuning: cross entropy with the data itself, no teacher.

    L = - mean log p(next token)          causal language models
    L = - mean log p(label)               classifiers

Full logits never exist: the head is applied to chunks of tokens (training/losses.py).
"""

from pydantic import Field
from torch import Tensor, nn

from compressor.distill.runner import backbone, next_tokens
from compressor.errors import CompressError
from compressor.model.forward import accepted
from compressor.model.model import Model
from compressor.options import options
from compressor.training.losses import chunk_of, chunked, head_of, label_loss
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
    if student.task not in ("causal-lm", "text-classification"):
        raise CompressError(
            f"distill.ce needs a model that predicts tokens or labels; this one is a "
            f"{student.task} model",
            "use distill.latent, which learns from the teacher's states",
        )
    return _CrossEntropy(student)


class _CrossEntropy(nn.Module):
    def __init__(self, student: Model) -> None:
        super().__init__()
        self.student = student  # a dataclass, not a submodule: its weights are not ours

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        student = self.student
        if student.task == "text-classification":
            logits_BC = student.module(**accepted(student, batch)).logits
            return label_loss(logits_BC, _labels(batch, logits_BC.shape[-1])).mean()
        hidden, head = backbone(student, batch).last_hidden_state, head_of(student)
        mask, targets = next_tokens(batch)
        streams = [hidden[:, :-1], targets]
        chunk = chunk_of(student.sizes["vocabulary"])
        return chunked(lambda h_ND, t_N: label_loss(head(h_ND), t_N), streams, mask, chunk)


def _labels(batch: dict[str, Tensor], classes: int) -> Tensor:
    if "labels" not in batch:
        raise CompressError(
            "fine-tuning a classifier needs labelled rows and the data has none",
            'give a .csv or .jsonl with the column "label"',
        )
    highest = int(batch["labels"].max())
    if highest >= classes:
        raise CompressError(
            f"the data has the label {highest} and the model {classes} classes",
            "number the labels from 0, or take a model with more classes",
        )
    return batch["labels"]
