"""Rows that speed and memory are measured on: real held-out rows, in exactly the wanted number.

models of tokens alone   rows of exactly `length` tokens of real text (inputs.token_rows):
                         speed depends on the shape, not on where a sentence ends, and padding
                         would flatter engines that skip it
all others               rows of one held-out batch (images, sounds, pairs), repeated where
                         there are too few; their shapes are what the data gives
"""

from compressor.measure.inputs import heldout, token_rows
from compressor.training.workbench import Batch, Workbench

_BATCH = 8  # held-out rows read at once
_TOKENS = {"input_ids", "attention_mask"}
_BOOKKEEPING = {"row", "document", "labels"}  # what a batch says about its rows; no model input


def model_inputs(batch: Batch) -> Batch:
    """The tensors of a batch that a model may read."""
    return {key: value for key, value in batch.items() if key not in _BOOKKEEPING}


def speed_rows(work: Workbench, rows: int, length: int) -> Batch:
    """Every input tensor of `rows` held-out rows.

    Args:
        work: gives the held-out batches.
        rows: first axis of every tensor of the result.
        length: tokens per row, of models that read tokens alone.

    Raises:
        CompressError: there is nothing held out.
    """
    batches = heldout(work, rows, _BATCH, length)
    first = model_inputs(batches[0])
    if set(first) == _TOKENS:
        return token_rows(batches, rows, length)
    there = len(next(iter(first.values())))
    return {key: value[[i % there for i in range(rows)]] for key, value in first.items()}
