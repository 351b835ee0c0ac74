"""Accuracy on held-out rows: of labels for a classifier, of tokens for a language model.

    accuracy = right answers / answers,   answer = argmax of the logits

A classifier of texts or images is scored on `labels` [B]; a causal language model on every token
that has one before it in its window, as in perplexity.py; a masked one on the hidden tokens; an
encoder-decoder on every token of the right answer, given those before it. Intervals are over
documents (interval.py).
"""

import torch
from pydantic import Field
from torch import Tensor

from compressor.engines import Engine
from compressor.errors import CompressError
from compressor.measure.inputs import documents, fitting_length, heldout, refuse_nan
from compressor.measure.interval import estimate
from compressor.model.checkpoint import read_task
from compressor.options import options
from compressor.training.pairs import IGNORED
from compressor.training.workbench import Batch, Workbench


@options
class Options:
    """How many rows are scored."""

    rows: int = Field(256, ge=1, description="rows scored, taken evenly from the split")
    length: int = Field(128, ge=2, description="tokens per row")
    batch: int = Field(8, ge=1, description="rows per forward pass")


def run(engine: Engine, options: Options, work: Workbench) -> dict[str, float]:
    """Score held-out rows.

    Returns:
        accuracy with _low, _high and _n (documents).

    Raises:
        CompressError: the model answers nothing that could be right, or rows have no labels.
    """
    task = read_task(engine.path)
    if task not in _SCORES:
        raise CompressError(
            f"'{engine.path.name}' is neither a classifier nor a language model, "
            "so it has no accuracy",
            "leave out accuracy; fidelity compares encoders",
        )
    score = _SCORES[task]
    length = fitting_length(engine.path, options.length)
    right, answers, owners, seen = [], [], [], 0
    for batch in heldout(work, options.rows, options.batch, length):
        logits = refuse_nan(engine.path, engine.outputs(batch)["logits"], batch)
        right_B, answers_B = score(logits, batch)
        right.append(right_B)
        answers.append(answers_B)
        owners.append(documents(batch, seen))
        seen += len(right_B)
    found = estimate(torch.cat(right), torch.cat(answers), torch.cat(owners))
    return found.keys("accuracy")


def _next_token(logits_BSV: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    mask = batch["attention_mask"].bool()
    scored = mask[:, 1:] & mask[:, :-1]
    hit = logits_BSV[:, :-1].argmax(dim=-1) == batch["input_ids"][:, 1:]
    return (hit & scored).sum(dim=1), scored.sum(dim=1)


def _labelled_tokens(logits_BSV: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    scored = batch["labels"] != IGNORED
    hit = logits_BSV.argmax(dim=-1) == batch["labels"]
    return (hit & scored).sum(dim=1), scored.sum(dim=1)


def _label(logits_BC: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    if "labels" not in batch:
        raise CompressError(
            "accuracy of a classifier needs labelled rows and the held-out data has none",
            'give a .csv or .jsonl with the column "label", or a folder with a subfolder per class',
        )
    hit = logits_BC.argmax(dim=-1) == batch["labels"]
    return hit.long(), torch.ones_like(hit, dtype=torch.long)


_SCORES = {
    "causal-lm": _next_token,
    "fill-mask": _labelled_tokens,
    "seq2seq-lm": _labelled_tokens,
    "speech-seq2seq": _labelled_tokens,
    "text-classification": _label,
    "image-classification": _label,
}
