"""SquareHead: the states of every layer follow the teacher's (arXiv 2310.06927).

    L   = c CE + s sum_l F_l + k T^2 KL(p_t || p_s)
    F_l = mean (h_s^l - h_t^l)^2 / (mean (h_t^l)^2 + eps)          l = 1 ... L

over the real tokens of a batch and all channels, so that the normalizer is one number for each
layer and batch; eps is bfloat16's, 2^-7. The output of the embeddings does not count; the last
state lies behind the final norm, in both models. Made for finetuning a sparse model on a task,
with the dense model it was pruned from as its teacher: cross entropy alone, or with logits, was
found to stall at high sparsity. The paper's own code weighs CE and the states with 1 and leaves the
logits out, which is the default. The authors of AST (arXiv 2407.20584) found the loss a poor one
for retraining on general text.

Where we differ: both stacks of an encoder-decoder count, each with its own mask; states are
compared in float32 whatever autocast says; full logits never exist. Student and teacher must have
equally many layers of one width: there is no projector.

Legend: B rows, S tokens, N real tokens or predictions, H width, V vocabulary or classes.
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compressor.distill.logits import refuse_unlike
from compressor.distill.predictions import (
    PREDICTING,
    Predictions,
    answers,
    checked_labels,
    positions_at_once,
    predictions,
)
from compressor.distill.runner import backbone, refuse_other_vocabulary
from compressor.distill.states import (
    States,
    depths,
    real_positions,
    refuse_other_patches,
    states_of,
)
from compressor.errors import CompressError
from compressor.model.model import CLASSIFIERS, Model
from compressor.options import options
from compressor.training.losses import chunked, divergence, label_loss, tokens_of
from compressor.training.options import Train
from compressor.training.parallel import team

EPS = torch.finfo(torch.bfloat16).eps


@options
class Options:
    """What counts in the loss; a weight of 0 switches a part off."""

    train: Train = Field(Train(), description="how long and how fast")
    ce: float = Field(1.0, ge=0, description="weight of plain cross entropy")
    squarehead: float = Field(1.0, ge=0, description="weight of the states of all layers")
    kl: float = Field(0.0, ge=0, description="weight of the teacher's predictions")
    temperature: float = Field(1.0, gt=0, le=100, description="softens the predictions for kl")
    freeze_embeddings: bool = Field(False, description="leave the token tables as they are")

    @model_validator(mode="after")
    def _something_counts(self) -> "Options":
        if self.ce == self.squarehead == self.kl == 0:
            raise ValueError("one of ce, squarehead and kl must be above 0")
        return self


def asks_teacher(options: Options) -> bool:
    """Whether the teacher counts: cross entropy alone does without one."""
    return options.squarehead > 0 or options.kl > 0


def objective(options: Options, student: Model, teacher: Model | None) -> nn.Module:
    """SquareHead between a student and a teacher of its shape; None where nothing asks it.

    Raises:
        CompressError: the teacher has other layers, reads or predicts something else, or there
            is nothing to predict and `ce` or `kl` want it.
    """
    if not asks_teacher(options):
        _refuse_headless(student)
        return _SquareHead(options, student, None)
    assert teacher is not None
    if options.ce or options.kl:
        _refuse_headless(student)
        refuse_unlike("squarehead", student, teacher, "forward", None, None)
    else:
        refuse_other_vocabulary(student, teacher)
    if options.squarehead:
        refuse_other_patches(student, teacher)
        _refuse_other_layers(student, teacher)
    return _SquareHead(options, student, teacher)


def _refuse_headless(student: Model) -> None:
    if student.task not in PREDICTING:
        raise CompressError(
            "cross entropy and kl need a model that predicts tokens or labels; this one is a "
            f"{student.task} model",
            "ce: 0 and kl: 0, so that only the states count",
        )


def _refuse_other_layers(student: Model, teacher: Model) -> None:
    shapes = [
        f"{' + '.join(map(str, depths(model)))} layers of width {model.sizes['hidden']}"
        for model in (student, teacher)
    ]
    if shapes[0] != shapes[1]:
        raise CompressError(
            f"squarehead compares all layers: the teacher has {shapes[1]}, the student {shapes[0]}",
            "teacher: stage:N, the stage whose model was made sparse",
        )


class _SquareHead(nn.Module):
    """The loss of one batch.

    Attributes:
        parts: what the last loss was made of, before weights.
    """

    def __init__(self, options: Options, student: Model, teacher: Model | None) -> None:
        super().__init__()
        self.options, self.student, self.teacher = options, student, teacher
        self.divergence = divergence("forward", options.temperature)
        self.parts: dict[str, Tensor] = {}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        options, hidden = self.options, self.options.squarehead > 0
        own = _passed(self.student, batch, hidden, head=bool(options.ce or options.kl))
        with torch.no_grad():
            teacher = self.teacher
            above = _passed(teacher, batch, hidden, options.kl > 0) if teacher else None
        self.parts, terms = {}, []
        if hidden:
            assert above is not None
            masks = real_positions(self.student, batch, own.hidden)
            states = states_loss(own.hidden, above.hidden, masks)
            self.parts["squarehead"] = states.detach()
            terms.append(options.squarehead * states)
        if options.ce or options.kl:
            terms.append(self._predicted(batch, own, above))
        return torch.stack(terms).sum()

    def _predicted(
        self, batch: dict[str, Tensor], own: Predictions, above: Predictions | None
    ) -> Tensor:
        """Weighted cross entropy and divergence, a chunk of positions at a time."""
        student, options = self.student, self.options
        mask, labels = answers(student.task, batch)
        streams, sums = [own.states], {}
        if options.ce:
            if student.task in CLASSIFIERS:
                labels = checked_labels(student, labels)
            assert labels is not None
            streams.append(labels)
        if options.kl:
            assert above is not None
            streams.append(above.states)

        def loss(own_NH: Tensor, *rest: Tensor) -> Tensor:
            own_NV, terms = own.head(own_NH), {}
            if options.ce:
                terms["ce"] = options.ce, label_loss(own_NV, rest[0])
            if options.kl and above is not None:
                terms["logits"] = options.kl, self.divergence(own_NV, above.head(rest[-1]))
            for name, (_, value_N) in terms.items():
                sums[name] = sums.get(name, 0) + value_N.detach().sum()
            return torch.stack([weight * value_N for weight, value_N in terms.values()]).sum(dim=0)

        total = chunked(loss, streams, mask, positions_at_once(student), own.weights)
        self.parts |= {name: value / tokens_of(mask) for name, value in sums.items()}
        return total


def _passed(model: Model, batch: dict[str, Tensor], hidden: bool, head: bool) -> Predictions:
    """One forward pass; without the head where nothing reads its predictions."""
    if head:
        return predictions(model, batch, hidden)
    states = states_of(backbone(model, batch, output_hidden_states=True))
    return Predictions(states[-1][-1], nn.Identity(), (), states)


def states_loss(own: States, above: States, masks: list[Tensor]) -> Tensor:
    """Sum of F_l over the layers of all stacks.

    Args:
        own: states of every stack, [B, S, H] each; the first of a stack is not compared.
        above: the teacher's, of the same shapes.
        masks: tokens [B, S] of every stack that count.
    """
    errors, energies = [], []
    for states, targets, mask in zip(own, above, masks, strict=True):
        values = tokens_of(mask) * states[0].shape[-1]
        for state, target in zip(states[1:], targets[1:], strict=True):
            own_NH, target_NH = state[mask].float(), target[mask].float()
            errors.append((own_NH - target_NH).square().sum() / values)
            energies.append(target_NH.square().sum() / values)
    means = torch.stack(energies)
    team().average([means])  # the normalizer is that of the whole batch
    return (torch.stack(errors) / (means + EPS)).sum()
