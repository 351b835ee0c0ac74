"""What the right answers of a batch are, and where a model gives its own.

    causal-lm                       the next token, wherever it and the one before it are real
    fill-mask                       the hidden tokens (labels [B, S], -100 elsewhere)
    seq2seq-lm, speech-seq2seq      the tokens of the answer (labels [B, T], -100 at padding)
    text-, image-classification     the class of the row (labels [B]), one position per row

Legend: B rows, S or T tokens, P positions, V answers to choose from.
"""

import torch
from torch import Tensor

from compressor.training.pairs import IGNORED
from compressor.training.workbench import Batch

LABELLED_TOKENS = ("fill-mask", "seq2seq-lm", "speech-seq2seq")
CLASSIFIERS = ("text-classification", "image-classification")
TASKS = ("causal-lm", *LABELLED_TOKENS, *CLASSIFIERS)


def answered(task: str, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor] | None:
    """Logits [B, P, V], right answers int64 [B, P], and bool [B, P] where there is one.

    Args:
        task: of the model, see read_task.
        logits: its output, [B, S, V], or [B, V] of a classifier.
        batch: what it read, with the labels that its task has.

    Returns:
        The three, or None where the rows have no labels, or the task has no right answers.
    """
    if task == "causal-lm":
        mask = batch["attention_mask"].bool()
        return logits[:, :-1], batch["input_ids"][:, 1:], mask[:, 1:] & mask[:, :-1]
    if task not in TASKS or "labels" not in batch:
        return None
    labels = batch["labels"]
    if task in CLASSIFIERS:
        return logits[:, None], labels[:, None], torch.ones_like(labels[:, None], dtype=torch.bool)
    return logits, labels, labels != IGNORED
