"""Hidden tokens for masked language models (BERT, arXiv 1810.04805).

15 % of the tokens of a row, at least one, are to be guessed: 80 % of them become the mask token,
10 % a random token, 10 % stay. Special tokens and padding never are. The draw is a function of
(seed, number of the batch), so every epoch hides others and held-out batches are always the same.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from compressor.errors import CompressError
from compressor.training.batches import Batches
from compressor.training.pairs import IGNORED
from compressor.training.workbench import Batch

SHARE, MASKED, RANDOM = 0.15, 0.8, 0.1
_STREAM = 15  # keeps these draws apart from those that shuffle with the same seed


def masked(batches: Sequence[Batch], processor: Any, seed: int) -> Batches:
    """The same batches with hidden tokens in input_ids, and labels int64 [B, S].

    Raises:
        CompressError: the tokenizer has no mask token.
    """
    if processor.mask_token_id is None:
        raise CompressError(
            "a masked language model needs a mask token and the tokenizer has none",
            "set mask_token in tokenizer_config.json",
        )

    def make(index: int) -> Batch:
        return hide(batches[index], processor, np.random.default_rng([seed, _STREAM, index]))

    return Batches(len(batches), make)


def hide(batch: Batch, processor: Any, draw: np.random.Generator) -> Batch:
    """A batch with some of its tokens hidden; labels are -100 where nothing is to be guessed.

    Raises:
        CompressError: no row has a token that could be hidden.
    """
    ids = batch["input_ids"].numpy()
    free = batch["attention_mask"].numpy().astype(bool) & ~np.isin(ids, processor.all_special_ids)
    if not free.any():
        raise CompressError(
            "the rows have no token that could be hidden", "give longer text, or raise length"
        )
    rank = np.where(free, draw.random(ids.shape), np.inf)
    chosen = free & ((rank < SHARE) | (rank == rank.min(axis=1, keepdims=True)))
    how = draw.random(ids.shape)
    found = np.where(chosen & (how < MASKED), processor.mask_token_id, ids)
    ordinary = np.setdiff1d(np.arange(len(processor)), processor.all_special_ids)
    swapped = chosen & (how >= MASKED) & (how < MASKED + RANDOM)
    found = np.where(swapped, draw.choice(ordinary, ids.shape), found)
    return batch | {
        "input_ids": torch.from_numpy(found),
        "labels": torch.from_numpy(np.where(chosen, ids, IGNORED)),
    }
