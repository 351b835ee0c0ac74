"""Pairs for encoder-decoders: tokens to read, and tokens to answer.

The decoder is fed the answer shifted to the right behind decoder_start_token_id and learns to give
every token of it, the end of the text included. Legend: B rows, T tokens of the longest answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.training.documents import Document
from compressor.training.rows import Rows, text_rows, tokenize

IGNORED = -100  # label of a position that does not count


@dataclass(frozen=True)
class PairRows:
    """Row r reads row r of `sources` and answers with row r of `answers`."""

    sources: Rows
    answers: Rows
    start: int

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of source and answer, int64 [R]."""
        return self.sources.lengths + self.answers.lengths

    def read(self, members: NDArray[np.int64]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, S] and the keys of `decoder_inputs`, all int64."""
        found = decoder_inputs(self.answers, members, self.start)
        return self.sources.read(members) | found


def pair_rows(documents: Sequence[Document], processor: Any, length: int, start: int) -> PairRows:
    """Tokenize both sides, each cut at `length` tokens."""
    sources = text_rows([d.text for d in documents], range(len(documents)), processor, length, None)
    return PairRows(sources, answer_rows(documents, processor, length, start), start)


def answer_rows(documents: Sequence[Document], processor: Any, length: int, start: int) -> Rows:
    """Tokens of every answer without the start token, which the decoder is fed, cut at `length`.

    The end of the text follows where the tokenizer has one and did not write it itself.
    """
    eos = processor.eos_token_id
    texts = [(d.target or "").strip() for d in documents]
    ids = []
    for row in tokenize(texts, processor, add_special_tokens=True):
        row = row[1:] if len(row) and row[0] in (start, processor.bos_token_id) else row
        if eos is not None and (not len(row) or row[-1] != eos):
            row = np.append(row, np.int32(eos))
        ids.append(row[:length])
    return Rows(
        tokens=np.concatenate([np.empty(0, np.int32), *ids]),
        offsets=np.array([0, *accumulate(len(row) for row in ids)], np.int64),
        documents=np.arange(len(ids), dtype=np.int64),
        pad=processor.pad_token_id or 0,
    )


def decoder_inputs(answers: Rows, members: NDArray[np.int64], start: int) -> dict[str, Tensor]:
    """What the decoder reads and should say.

    Returns:
        decoder_input_ids, decoder_attention_mask and labels [B, T], -100 at padding; row and
        document [B]; all int64.
    """
    found = answers.read(members)
    ids, mask = found["input_ids"], found["attention_mask"]
    before = torch.full_like(ids[:, :1], start)
    shifted = torch.cat([before, ids[:, :-1]], dim=1).masked_fill(mask == 0, answers.pad)
    return {
        "decoder_input_ids": shifted,
        "decoder_attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, IGNORED),
        "row": found["row"],
        "document": found["document"],
    }
