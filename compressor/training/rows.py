"""Tokenized rows of one split, in flat arrays.

Encoders: one row per paragraph, of any length. Decoders: all documents in one stream, BOS before
and EOS after each where the tokenizer has them, cut into windows of `length` tokens. Attention
is not blocked between the documents of a window, neither for the student nor for the teacher.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.training.sources import Document

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

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every row, int64 [R]."""
        return np.diff(self.offsets)


def paragraph_rows(documents: Sequence[Document], processor: Any, length: int) -> Rows:
    """Tokenize every row of every document with special tokens, cut at `length`."""
    texts = [text for document in documents for text in document.rows]
    owners = [i for i, document in enumerate(documents) for _ in document.rows]
    given = {"add_special_tokens": True, "truncation": True, "max_length": length}
    ids = list(_tokenize(texts, processor, **given))
    labels = [documents[i].label for i in owners]
    known = bool(labels) and labels[0] is not None
    return Rows(
        tokens=np.concatenate([np.empty(0, np.int32), *ids]),
        offsets=np.array([0, *accumulate(len(row) for row in ids)], np.int64),
        documents=np.array(owners, np.int64),
        labels=np.array(labels, np.int64) if known else None,
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
        for ids in _tokenize(texts, processor, add_special_tokens=False)
    ]
    starts = [0, *accumulate(len(piece) for piece in pieces)]
    return np.concatenate(pieces), np.array(starts[:-1], np.int64)


def packed_rows(tokens: NDArray[np.int32], starts: NDArray[np.int64], length: int) -> Rows:
    """Windows of `length` tokens of a stream; a window belongs to the document it begins in."""
    offsets = np.arange(len(tokens) // length + 1, dtype=np.int64) * length
    owners = np.searchsorted(starts, offsets[:-1], side="right") - 1
    return Rows(tokens, offsets, owners.astype(np.int64))


def _tokenize(
    texts: Sequence[str], processor: Any, **arguments: Any
) -> Iterator[NDArray[np.int32]]:
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
