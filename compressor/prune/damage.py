"""What a model loses while layers are skipped: likelihood, right answers, or its own output.

    perplexity  -ln p(answer), in nats: the loss without the layers
    accuracy    right answers of the whole model - right answers without the layers
    output      1 - cos(last hidden state of the whole model, the same without the layers)

Which positions are answers is the task's business (distill/predictions.py): next tokens, hidden
tokens, tokens of a reply, labels. Each function is a `Damage` of model/depth.py. Sums are float64.

Legend: A answers of a batch, V vocabulary or classes, H width.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from compressor.distill.predictions import (
    PREDICTING,
    answers,
    checked_labels,
    positions_at_once,
    predictions,
)
from compressor.distill.runner import backbone
from compressor.errors import CompressError
from compressor.model.depth import Batch, Damage, Lost
from compressor.model.forward import output_mask
from compressor.model.model import CLASSIFIERS, Model
from compressor.training.losses import label_loss

Ranking = Literal["block_influence", "perplexity", "accuracy", "output"]


def perplexity(model: Model, batch: Batch) -> Lost:
    """Cross-entropy of the answers."""
    return lambda: _over_answers(model, batch, label_loss)


def accuracy(model: Model, batch: Batch) -> Lost:
    """Right answers that are lost."""
    before, _ = _over_answers(model, batch, _right)

    def lost() -> tuple[float, int]:
        right, count = _over_answers(model, batch, _right)
        return before - right, count

    return lost


def output(model: Model, batch: Batch) -> Lost:
    """Turn of the last hidden states, over real tokens."""
    before_AH = _last_states(model, batch)

    def lost() -> tuple[float, int]:
        cosine_A = torch.cosine_similarity(before_AH, _last_states(model, batch))
        return float((1 - cosine_A).double().sum()), len(cosine_A)

    return lost


BY_ANSWERS = ("perplexity", "accuracy")
DAMAGES: dict[str, Damage] = {"perplexity": perplexity, "accuracy": accuracy, "output": output}


def refuse_unpredictable(model: Model, ranking: Ranking) -> None:
    """Refuse a ranking by answers for a model that gives none.

    Raises:
        CompressError: names the ranking that works.
    """
    if ranking in BY_ANSWERS and model.task not in PREDICTING:
        raise CompressError(
            f"layer_importance: {ranking} needs a model that predicts tokens or labels; this one "
            f"is a {model.task} model",
            "layer_importance: output compares its last hidden states",
        )


def refuse_unlabelled(model: Model, batch: Batch) -> None:
    """Refuse a ranking by answers for a classifier whose rows have no labels.

    Raises:
        CompressError: they have none.
    """
    if model.task in CLASSIFIERS:
        checked_labels(model, answers(model.task, batch)[1])


def _right(logits_AV: Tensor, targets_A: Tensor) -> Tensor:
    return logits_AV.argmax(dim=-1) == targets_A


def _over_answers(
    model: Model, batch: Batch, score: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, int]:
    """Sum of a score [A] over the answers, and their number; the logits of few at a time."""
    found = predictions(model, batch)
    mask, targets = answers(model.task, batch)
    if model.task in CLASSIFIERS:
        targets = checked_labels(model, targets)
    assert targets is not None
    keep, at_once = mask.bool(), positions_at_once(model)
    pieces = zip(found.states[keep].split(at_once), targets[keep].split(at_once), strict=True)
    total = sum(float(score(found.head(s), t).double().sum()) for s, t in pieces)
    return total, int(keep.sum())


def _last_states(model: Model, batch: Batch) -> Tensor:
    """[A, H] of the real tokens, float32, before any task head."""
    result = backbone(model, batch)
    states = (result.logits if "logits" in result else result.last_hidden_state).float()
    mask = output_mask(batch)
    return states.flatten(0, 1) if mask is None else states[mask.bool()]
