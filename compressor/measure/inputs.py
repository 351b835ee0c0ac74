"""Held-out text as the measures take it, and what a directory says about its model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compressor.errors import CompressError
from compressor.model.forward import output_mask
from compressor.model.shapes import config_of
from compressor.model.sources import stated_config
from compressor.training.reading import most_tokens
from compressor.training.workbench import Batch, Workbench


def fitting_length(path: Path, length: int) -> int:
    """`length`, or the most tokens that the model takes when that is smaller."""
    return min(length, most_tokens(config_of(stated_config(path))) or length)


def heldout(work: Workbench, rows: int, batch: int, length: int) -> list[Batch]:
    """About `rows` held-out rows, taken evenly from the whole split.

    The split runs in document order; its first rows alone would be a few documents.

    Raises:
        CompressError: the split is empty.
    """
    found = work.batches("heldout", None, batch=batch, length=length)
    if not found:
        raise CompressError("the held-out split has no rows", "give more documents with --data")
    wanted = min(len(found), -(-rows // batch))
    return [found[i * len(found) // wanted] for i in range(wanted)]


def refuse_nan(path: Path, values: Tensor, batch: Batch) -> Tensor:
    """The outputs `values` of the model in `path`, unless a real position has NaN.

    Raises:
        CompressError: it has; scores of NaN would look like any other.
    """
    mask = output_mask(batch)
    whole = mask is None or values.shape[:2] != mask.shape
    real = values if whole or mask is None else values[mask.bool()]
    if bool(real.isnan().any()):
        raise CompressError(f"'{path.name}' gives NaN", "make it again; its log.txt may say why")
    return values


def documents(batch: Batch, start: int) -> Tensor:
    """[B] document of each row; rows of data without documents count as one each.

    Args:
        batch: a batch, with or without the key `document`.
        start: rows seen before this batch.
    """
    rows = len(next(iter(batch.values())))
    return batch["document"] if "document" in batch else torch.arange(start, start + rows)


def token_rows(batches: Sequence[Batch], rows: int, length: int) -> Batch:
    """A batch [rows, length] without padding: real text joined, and repeated where it is short.

    Speed depends on the shape and not on where a sentence ends, and padding would flatter
    engines that skip it.
    """
    stream = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in batches])
    stream = stream.repeat(-(-rows * length // len(stream)))[: rows * length]
    ids = stream.reshape(rows, length).contiguous()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
