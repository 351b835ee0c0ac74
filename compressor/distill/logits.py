"""Learning from a teacher's predictions: what distill.kd and distill.minitron share.

    L = w T^2 D(softmax(z_t / T), softmax(z_s / T)) + c CE(z_s)        mean over positions

Positions are those of predictions.py. Backbones run once; both heads are applied to chunks of
positions, so full logits never exist.

With `top_k` only the teacher's k largest log-probabilities of a position are known. Its
distribution is renormalized over them and the forward KL is taken against the student's full
distribution: what the student gives to all other tokens still costs, in one sum.

With `correct_teacher` the teacher is trained at the same time (arXiv 2408.11796): one forward
pass gives its own cross entropy and, detached, the target. Its weights are then parameters of
this module; the value of the loss stays the student's.

Legend: N positions, H width, V vocabulary or classes, K tokens that are kept.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from compressor.distill.predictions import (
    Predictions,
    answers,
    checked_labels,
    positions_at_once,
    predictions,
    refuse_without_predictions,
)
from compressor.distill.runner import refuse_other_vocabulary
from compressor.errors import CompressError
from compressor.model.manifest import quantized
from compressor.model.model import CLASSIFIERS, Model
from compressor.options import options
from compressor.training.losses import (
    Kind,
    chunked,
    divergence,
    label_loss,
    tokens_of,
    truncated_kl,
)
from compressor.training.options import Train
from compressor.training.teacher import given_outputs

HARMFUL = 100  # kept tokens at or below which arXiv 2407.14679 saw worse students
_INDEX, _LOG_P = "index", "log_p"


@options
class Correction:
    """Training the teacher alongside."""

    lr: float = Field(1e-4, gt=0, le=1, description="highest rate: a fifth of pre-training's")


@options
class LogitsOptions:
    """What every distillation on logits can be told; the weight of cross entropy differs."""

    train: Train = Field(Train(), description="how long and how fast")
    kind: Kind = Field("forward", description="divergence")
    temperature: float = Field(1.0, gt=0, le=100, description="softens both distributions")
    top_k: int | None = Field(
        None, ge=1, description="keep the teacher's largest logits of each token on disk"
    )
    correct_teacher: Correction | None = Field(None, description="train the teacher alongside")
    freeze_embeddings: bool = Field(False, description="leave the token tables as they are")


class LogitsLoss(nn.Module):
    """Divergence from the teacher's predictions plus a share of cross entropy, for one batch.

    Attributes:
        parts: means of the last batch: logits, and, where they count, ce and teacher ce.
        cache_teacher: whether the teacher's answers are kept on disk; see training/teacher.py.
        rates: what learns at a rate of its own; see training/loop.py.
        remarks: sentences that the user should read before any work.
    """

    def __init__(
        self,
        student: Model,
        teacher: Model,
        kind: Kind,
        temperature: float,
        weight: float,
        ce: float,
        top_k: int | None = None,
        correct_teacher: Correction | None = None,
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.divergence, self.temperature = divergence(kind, temperature), temperature
        self.weight, self.ce = weight, ce
        self.cache_teacher = top_k is not None
        self.kept = kept_tokens(top_k, student.sizes["vocabulary"])
        self.remarks = () if top_k is None else _remarks(top_k, student.sizes["vocabulary"])
        self.corrects = correct_teacher is not None
        self.rates: dict[str, tuple[nn.Module, float]] = {}
        self.parts: dict[str, Tensor] = {}
        if correct_teacher is not None:
            self.moving = _trainable(teacher)
            self.rates = {"teacher": (self.moving, correct_teacher.lr)}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch whose teacher answers may be in it."""
        own = predictions(self.student, batch)
        if self.cache_teacher:
            return self.compare(batch, own, given_outputs(batch) or self.targets(batch))
        return self.compare(batch, own, self.ask(batch))

    def ask(self, batch: dict[str, Tensor], hidden: bool = False) -> Predictions:
        """The teacher's predictions; with a graph only where it is trained."""
        with torch.set_grad_enabled(self.corrects and torch.is_grad_enabled()):
            return predictions(self.teacher, batch, hidden)

    @torch.no_grad()
    def targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's answers as they are kept on disk."""
        return self.largest(self.ask(batch))

    @torch.no_grad()
    def largest(self, above: Predictions) -> dict[str, Tensor]:
        """The K largest log-probabilities of every token [B, S, K], and whose they are.

        The last token predicts nothing and has zeros. Ids take two bytes where they fit.
        """
        flat, found = above.states.flatten(0, 1), []
        for chunk in flat.split(positions_at_once(self.teacher)):
            found.append(above.head(chunk).float().log_softmax(dim=-1).topk(self.kept, dim=-1))
        rows = above.states.shape[:2]
        log_p = torch.cat([part.values for part in found]).unflatten(0, rows)
        index = torch.cat([part.indices for part in found]).unflatten(0, rows)
        log_p, index = pad(log_p, (0, 0, 0, 1)), pad(index, (0, 0, 0, 1))
        return {_INDEX: index.to(id_type(self.student.sizes["vocabulary"])), _LOG_P: log_p}

    def compare(
        self, batch: dict[str, Tensor], own: Predictions, above: Predictions | dict[str, Tensor]
    ) -> Tensor:
        """The loss between predictions and what the teacher says, live or as `largest` gives it."""
        mask, labels = answers(self.student.task, batch)
        streams = [own.states, *_streams(above)]
        if self.ce or self.corrects:
            if self.student.task in CLASSIFIERS:
                labels = checked_labels(self.student, labels)
            assert labels is not None
            streams.append(labels)
        sums: dict[str, Tensor] = {}

        def loss(own_NH: Tensor, *rest: Tensor) -> Tensor:
            own_NV = own.head(own_NH)
            terms = self._terms(own_NV, above, rest)
            for name, (_, value_N) in terms.items():
                sums[name] = sums.get(name, 0) + value_N.detach().sum()
            return torch.stack([weight * value_N for weight, value_N in terms.values()]).sum(dim=0)

        weights = own.weights
        if isinstance(above, Predictions) and self.corrects:
            weights += above.weights
        total = chunked(loss, streams, mask, positions_at_once(self.student), weights)
        count = tokens_of(mask)
        self.parts = {name: value / count for name, value in sums.items()}
        return total - self.parts["teacher ce"] if self.corrects else total

    def _terms(self, own_NV: Tensor, above: Any, rest: Any) -> dict[str, tuple[float, Tensor]]:
        """{name: (weight, value [N])} of a chunk; `rest` are its streams behind the student's."""
        terms = {}
        if isinstance(above, Predictions):
            with torch.set_grad_enabled(self.corrects and torch.is_grad_enabled()):
                above_NV = above.head(rest[0])
            value_N = self.divergence(own_NV, above_NV.detach())
            if self.corrects:
                terms["teacher ce"] = (1.0, label_loss(above_NV, rest[-1]))
        else:
            index_NK, log_p_NK = rest[:2]
            value_N = truncated_kl(own_NV, index_NK, log_p_NK, self.temperature)
        terms["logits"] = (self.weight, value_N)
        if self.ce:
            terms["ce"] = (self.ce, label_loss(own_NV, rest[-1]))
        return terms


def refuse_unlike(
    method: str,
    student: Model,
    teacher: Model,
    kind: str,
    top_k: int | None,
    correct_teacher: Correction | None,
) -> None:
    """Raise CompressError unless the teacher's predictions can be compared with the student's."""
    refuse_without_predictions(method, student)
    if teacher.task != student.task:
        raise CompressError(
            f"the teacher is a {teacher.task} model, the student a {student.task} model",
            "take a teacher of the same task",
        )
    refuse_other_vocabulary(student, teacher)
    mine, theirs = student.config.num_labels, teacher.config.num_labels
    if student.task in CLASSIFIERS and mine != theirs:
        raise CompressError(
            f"the teacher has {theirs} classes and the student {mine}",
            "choose a teacher of the same classes, e.g. teacher: input",
        )
    if top_k is not None:
        _refuse_top_k(student, kind, correct_teacher)
    if correct_teacher is not None and quantized(teacher.formats):
        raise CompressError(
            "the teacher is quantized, so it cannot be trained", "correct_teacher: null"
        )


def _refuse_top_k(student: Model, kind: str, correct_teacher: Correction | None) -> None:
    if student.task != "causal-lm":
        raise CompressError(
            f"top_k keeps a teacher's answers to rows that are always the same text, and this is a "
            f"{student.task} model",
            "top_k: null",
        )
    if kind != "forward":
        raise CompressError(
            f"top_k knows only a part of the teacher's distribution, which kind: {kind} cannot use",
            "kind: forward, or top_k: null",
        )
    if correct_teacher is not None:
        raise CompressError(
            "top_k asks the teacher once, and correct_teacher changes it at every step",
            "top_k: null, or correct_teacher: null",
        )


def kept_tokens(top_k: int | None, vocabulary: int) -> int:
    """Tokens of a position that are kept on disk."""
    return min(top_k or 0, vocabulary)


def kept_bytes(top_k: int | None, vocabulary: int) -> int:
    """Bytes of disk for one position: ids and float16 log-probabilities."""
    return kept_tokens(top_k, vocabulary) * (id_type(vocabulary).itemsize + 2)


def id_type(vocabulary: int) -> torch.dtype:
    """The smallest type that holds every id."""
    return torch.uint16 if vocabulary <= 2**16 else torch.int32


def _remarks(top_k: int, vocabulary: int) -> tuple[str, ...]:
    if top_k >= vocabulary:
        return (
            f"top_k is {top_k} and the vocabulary has {vocabulary} tokens: the teacher's whole "
            "distribution is kept",
        )
    if top_k <= HARMFUL:
        return (
            f"top_k is {top_k}: Minitron (arXiv 2407.14679) found worse students with {HARMFUL} "
            "tokens or fewer",
        )
    return ()


def _streams(above: Predictions | dict[str, Tensor]) -> list[Tensor]:
    if isinstance(above, Predictions):
        return [above.states]
    return [above[_INDEX][:, :-1].long(), above[_LOG_P][:, :-1]]


def _trainable(teacher: Model) -> nn.Module:
    """The teacher's module with gradients, but for what its family never trains."""
    teacher.module.requires_grad_(True)
    for name in teacher.family.fixed:
        teacher.base.get_submodule(name).requires_grad_(False)
    return teacher.module
