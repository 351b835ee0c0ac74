"""Where a model answers, and what the right answers are.

They are those that training learns (distill/predictions.py): the next token of a causal language
model, hidden tokens, the tokens of an answer, or the class of a row, which is one position.

Legend: B rows, S or T tokens, P positions, V answers to choose from.
"""

from torch import Tensor

from compressor.distill.predictions import PREDICTING, answers
from compressor.model.model import CLASSIFIERS
from compressor.training.workbench import Batch


def answered(task: str, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor] | None:
    """Logits [B, P, V], right answers int64 [B, P], and bool [B, P] where there is one.

    Args:
        task: of the model, see read_task.
        logits: its output, [B, S, V], or [B, V] of a classifier.
        batch: what it read, with the labels that its task has.

    Returns:
        The three, or None where the rows have no labels, or the task has no right answers.
    """
    if task not in PREDICTING or (task != "causal-lm" and "labels" not in batch):
        return None
    mask, targets = answers(task, batch)
    assert targets is not None
    if task == "causal-lm":
        return logits[:, :-1], targets, mask
    if task in CLASSIFIERS:
        return logits[:, None], targets[:, None], mask[:, None]
    return logits, targets, mask
