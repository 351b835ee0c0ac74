"""Accuracy on held-out rows: of labels for a classifier, of tokens for a language model.

    accuracy = right answers / answers,   answer = argmax of the logits

A classifier of texts or images is scored on `labels` [B]; a causal language model on every token
that has one before it in its window, as in perplexity.py; a masked one on the hidden tokens; an
encoder-decoder on every token of the right answer, given those before it (gold.py). Intervals are
over documents (interval.py).
"""

import torch
from pydantic import Field

from compressor.distill.predictions import PREDICTING
from compressor.engines import Engine
from compressor.errors import CompressError
from compressor.measure.gold import answered
from compressor.measure.inputs import documents, fitting_length, heldout, refuse_nan
from compressor.measure.interval import estimate
from compressor.model.checkpoint import read_task
from compressor.options import options
from compressor.training.workbench import Workbench

TASKS = PREDICTING


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
    if task not in TASKS:
        raise CompressError(
            f"'{engine.path.name}' is neither a classifier nor a language model, "
            "so it has no accuracy",
            "leave out accuracy; fidelity compares encoders",
        )
    length = fitting_length(engine.path, options.length)
    right, answers, owners, seen = [], [], [], 0
    for batch in heldout(work, options.rows, options.batch, length):
        logits = refuse_nan(engine.path, engine.outputs(batch)["logits"], batch)
        found = answered(task, logits, batch)
        if found is None:
            raise CompressError(
                "accuracy of a classifier needs labelled rows and the held-out data has none",
                'give a .csv or .jsonl with the column "label", or a folder with a subfolder per '
                "class",
            )
        logits_BPV, answers_BP, scored_BP = found
        hit_BP = (logits_BPV.argmax(dim=-1) == answers_BP) & scored_BP
        right.append(hit_BP.sum(dim=1))
        answers.append(scored_BP.sum(dim=1))
        owners.append(documents(batch, seen))
        seen += len(hit_BP)
    return estimate(torch.cat(right), torch.cat(answers), torch.cat(owners)).keys("accuracy")
