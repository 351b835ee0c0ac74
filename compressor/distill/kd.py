"""Knowledge distillation on logits (Hinton et al., arXiv 1503.02531).

    L = (1 - c) T^2 D(softmax(z_t / T), softmax(z_s / T)) + c CE

with D the forward KL by default, T = 1 and c = 0: what Minitron found best for pruned models
(arXiv 2407.14679). Backbones run once; both heads are applied to chunks of tokens.
Legend: N tokens, H width, V vocabulary.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.distill.runner import backbone, next_tokens, refuse_other_vocabulary
from compressor.errors import CompressError
from compressor.model.forward import accepted
from compressor.model.model import Model
from compressor.options import options
from compressor.training.losses import chunk_of, chunked, divergence, head_of, label_loss
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
    if student.task not in ("causal-lm", "text-classification"):
        raise CompressError(
            f"distill.kd needs logits; this is a {student.task} model",
            "use distill.latent, which learns from the teacher's states",
        )
    if teacher.task != student.task:
        raise CompressError(
            f"the teacher is a {teacher.task} model, the student a {student.task} model",
            "take a teacher of the same task",
        )
    refuse_other_vocabulary(student, teacher)
    return _Distillation(options, student, teacher)


class _Distillation(nn.Module):
    def __init__(self, options: Options, student: Model, teacher: Model) -> None:
        super().__init__()
        self.options, self.student, self.teacher = options, student, teacher
        self.divergence = divergence(options.kind, options.temperature)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        student, teacher = self.student, self.teacher
        if student.task == "text-classification":
            with torch.no_grad():
                target_NV = teacher.module(**accepted(teacher, batch)).logits
            own_NV = student.module(**accepted(student, batch)).logits
            if self.options.ce > 0 and "labels" not in batch:
                raise CompressError("ce needs labelled rows and the data has none", "set ce: 0")
            return self._mix(own_NV, target_NV, batch.get("labels")).mean()
        mask, targets = next_tokens(batch)
        with torch.no_grad():
            target = backbone(teacher, batch).last_hidden_state[:, :-1]
        own = backbone(student, batch).last_hidden_state[:, :-1]
        head_s, head_t = head_of(student), head_of(teacher)

        def loss(own_NH: Tensor, target_NH: Tensor, targets_N: Tensor) -> Tensor:
            with torch.no_grad():
                target_NV = head_t(target_NH)
            return self._mix(head_s(own_NH), target_NV, targets_N)

        return chunked(loss, [own, target, targets], mask, chunk_of(student.sizes["vocabulary"]))

    def _mix(self, own_NV: Tensor, target_NV: Tensor, targets_N: Tensor | None) -> Tensor:
        """Loss [N] of each token or text."""
        share = self.options.ce
        loss_N = self.divergence(own_NV, target_NV)
        if share == 0 or targets_N is None:
            return loss_N
        return (1 - share) * loss_N + share * label_loss(own_NV, targets_N)
