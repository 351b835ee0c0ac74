"""What a model predicts in one batch: states, the head that reads them, and the right answers.

The task decides, not the architecture:

    causal-lm                       the next token, wherever it and this one are real
    fill-mask                       the hidden tokens (labels [B, S], -100 elsewhere)
    seq2seq-lm, speech-seq2seq      the tokens of the answer (labels [B, T], -100 at padding)
    text-, image-classification     the class of the row (labels [B]); the states are the logits

Heads over a vocabulary are left for the caller to apply to chunks of positions, so that the
logits of a whole batch never exist. Legend: B rows, S tokens, T tokens of an answer, H width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.distill.states import States, states_of
from compressor.errors import CompressError
from compressor.model.forward import accepted, without_cache
from compressor.model.model import CLASSIFIERS, Model
from compressor.training.losses import chunk_of, head_of

PREDICTING = ("causal-lm", "fill-mask", "seq2seq-lm", "speech-seq2seq", *CLASSIFIERS)


@dataclass(frozen=True)
class Predictions:
    """States [..., H] of positions and the head that turns them into logits [..., V].

    `weights` are the parameters of the head that are trained; `hidden` are the hidden states of
    every stack, where they were asked for.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]
    weights: tuple[Tensor, ...] = ()
    hidden: States = field(default_factory=list)


def predictions(model: Model, batch: dict[str, Tensor], hidden: bool = False) -> Predictions:
    """Run a model once, up to its output projection; positions are those of `answers`.

    Args:
        hidden: also give the hidden states of this very pass.
    """
    inputs = accepted(model, batch) | without_cache(model)
    inputs |= {"output_hidden_states": True} if hidden else {}
    if model.task in CLASSIFIERS:
        with _base_output(model) as said:
            logits = model.module(**inputs).logits
        return Predictions(logits, nn.Identity(), (), states_of(said[0]) if hidden else [])
    module: Any = model.module
    head = module.get_output_embeddings()
    weights = tuple(p for p in head.parameters() if p.requires_grad)
    if model.task == "causal-lm":  # its class may cap the logits: the backbone alone is run
        output = model.base(**inputs)
        states, head = output.last_hidden_state[:, :-1], head_of(model)
    else:
        with passing_through(head):
            output = module(**inputs)
        states = output.logits
    return Predictions(states, head, weights, states_of(output) if hidden else [])


@contextmanager
def _base_output(model: Model) -> Iterator[list[Any]]:
    """What the backbone gives inside: a classifier's own output lacks the state behind its norm."""
    said: list[Any] = []
    hook = model.base.register_forward_hook(lambda module, inputs, output: said.append(output))
    try:
        yield said
    finally:
        hook.remove()


@contextmanager
def passing_through(head: Any) -> Iterator[None]:
    """The output projection gives back what it is given, for one forward pass.

    What the class does before it (BERT's transform, T5's scale) is done as ever.
    """
    head.forward = nn.Identity().forward
    try:
        yield
    finally:
        del head.forward


def answers(task: str, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """(mask, targets) of the positions of `predictions`; targets are None without labels.

    Raises:
        CompressError: a masked or sequence-to-sequence model has no labels.
    """
    if task == "causal-lm":
        return next_tokens(batch)
    labels = batch.get("labels")
    if task in CLASSIFIERS:
        rows = batch["pixel_values" if task == "image-classification" else "input_ids"]
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device), labels
    assert labels is not None, f"batches for {task} have labels"
    return labels != -100, labels


def next_tokens(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(mask, targets), both [B, S-1]: which positions predict a real token, and which token."""
    mask = batch["attention_mask"].bool()
    return mask[:, :-1] & mask[:, 1:], batch["input_ids"][:, 1:]


def positions_at_once(model: Model) -> int:
    """Positions whose logits are held at once."""
    return chunk_of(max(model.sizes["vocabulary"], getattr(model.config, "num_labels", 1)))


def unlabelled(task: str, more: str = "") -> CompressError:
    """What is said where cross entropy of a classifier finds no labels; `more` ends the hint."""
    hint = (
        "give a folder with one subfolder for each class"
        if task == "image-classification"
        else 'give a .csv or .jsonl with the column "label"'
    )
    return CompressError(
        "cross entropy of a classifier needs labelled rows and the data has none", hint + more
    )


def checked_labels(model: Model, labels: Tensor | None) -> Tensor:
    """The labels of a classifier's rows.

    Raises:
        CompressError: there are none, or one is no class of the model.
    """
    if labels is None:
        raise unlabelled(model.task)
    highest, classes = int(labels.max()), model.config.num_labels
    if highest >= classes:
        raise CompressError(
            f"the data has the label {highest} and the model {classes} classes",
            "number the labels from 0, or take a model with more classes",
        )
    return labels


def refuse_without_predictions(method: str, model: Model) -> None:
    """Raise CompressError when a model has no head that predicts something."""
    if model.task not in PREDICTING:
        raise CompressError(
            f"{method} needs a model that predicts tokens or labels; this one is a "
            f"{model.task} model",
            "use distill.latent, which learns from the teacher's states",
        )
