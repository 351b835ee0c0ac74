"""Tokenized rows of one split, in flat arrays.

Encoders: one row per paragraph, of any length. Decoders: all documents in one stream, BOS before
and EOS after each where the tokenizer has them, cut into windows of `length` tokens. Attention
is not blocked between the documents of a window, neither for the student nor for the teacher.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.training.documents import Document

_AT_ONCE = 512  # texts tokenized in one call, so that few Python lists of ids live at a time


@dataclass(frozen=True)
class Rows:
    """Row r is tokens[offsets[r]:offsets[r + 1]] of document documents[r].

    Attributes:
        tokens: int32 [N].
        offsets: int64 [R + 1].
        documents: int64 [R], index of the document in its split.
        labels: int64 [R], or None without labels.
        pad: token id that fills short rows.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    documents: NDArray[np.int64]
    labels: NDArray[np.int64] | None = None
    pad: int = 0

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every row, int64 [R]."""
        return np.diff(self.offsets)

    def read(self, members: NDArray[np.int64]) -> dict[str, Tensor]:
        """Rows padded on the right to the longest of them.

        Returns:
            input_ids and attention_mask int64 [B, S], row and document int64 [B], and labels
            int64 [B] where the data has them.
        """
        lengths = self.offsets[members + 1] - self.offsets[members]
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(mask.shape, self.pad, np.int64)
        ids[mask] = np.concatenate([self.tokens[slice(*self.offsets[r : r + 2])] for r in members])
        arrays = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "row": members}
        arrays["document"] = self.documents[members]
        if self.labels is not None:
            arrays["labels"] = self.labels[members]
        return {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}


def paragraph_rows(documents: Sequence[Document], processor: Any, length: int) -> Rows:
    """Tokenize every row of every document with special tokens, cut at `length`."""
    texts = [text for document in documents for text in document.rows]
    owners = [i for i, document in enumerate(documents) for _ in document.rows]
    labels = [documents[i].label for i in owners]
    known = bool(labels) and labels[0] is not None
    return text_rows(texts, owners, processor, length, labels if known else None)


def text_rows(
    texts: Sequence[str], owners: Sequence[int], processor: Any, length: int, labels: Any
) -> Rows:
    """One row for each text, with special tokens, cut at `length`."""
    given = {"add_special_tokens": True, "truncation": True, "max_length": length}
    ids = list(tokenize(texts, processor, **given))
    return Rows(
        tokens=np.concatenate([np.empty(0, np.int32), *ids]),
        offsets=np.array([0, *accumulate(len(row) for row in ids)], np.int64),
        documents=np.array(owners, np.int64),
        labels=None if labels is None else np.array(labels, np.int64),
        pad=processor.pad_token_id or 0,
    )


def stream_of(
    documents: Sequence[Document], processor: Any
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """All documents in one stream of tokens [N], and where each begins [documents]."""
    bos, eos = processor.bos_token_id, processor.eos_token_id
    before = [] if bos is None else [bos]
    after = [] if eos is None or eos == bos else [eos]
    texts = [document.text.strip() for document in documents]
    pieces = [
        np.array([*before, *ids, *after], np.int32)
        for ids in tokenize(texts, processor, add_special_tokens=False)
    ]
    starts = [0, *accumulate(len(piece) for piece in pieces)]
    return np.concatenate(pieces), np.array(starts[:-1], np.int64)


def packed_rows(tokens: NDArray[np.int32], starts: NDArray[np.int64], length: int) -> Rows:
    """Windows of `length` tokens of a stream; a window belongs to the document it begins in."""
    offsets = np.arange(len(tokens) // length + 1, dtype=np.int64) * length
    owners = np.searchsorted(starts, offsets[:-1], side="right") - 1
    return Rows(tokens, offsets, owners.astype(np.int64))


def tokenize(texts: Sequence[str], processor: Any, **arguments: Any) -> Iterator[NDArray[np.int32]]:
    """Ids of every text; `verbose` off, since longer than the model is no mistake here."""
    for start in range(0, len(texts), _AT_ONCE):
        found = processor(
            list(texts[start : start + _AT_ONCE]),
            return_attention_mask=False,
            verbose=False,
            **arguments,
        )
        for ids in found["input_ids"]:
            yield np.array(ids, np.int32)
