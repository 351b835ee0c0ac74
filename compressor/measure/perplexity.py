"""Perplexity and bits per byte of a language model on held-out text; lower is better.

    perplexity = exp(sum of -ln p(token | tokens before it in its window) / scored tokens)
    bits_per_byte = sum of nats / ln 2 / UTF-8 bytes of the scored text

Windows: the documents of the split follow each other in one stream, BOS before and EOS after each
where the tokenizer has them (training/rows.py). The stream is cut every `length` tokens: the
stride is the length of a window, so windows do not overlap and every token is in one at most; what
is left at the end, shorter than a window, is not used. Attention is not blocked between the
documents of a window. `rows` windows are scored, in whole batches taken evenly from the split.

First token: that of a window is context only, since nothing precedes it. Every other token of a
window is scored exactly once, BOS and EOS among them, with 1 to length - 1 tokens before it. Longer
windows therefore give lower numbers: compare only numbers of the same length and tokenizer.

Bytes: the text of a window as the tokenizer beside the model decodes it, minus that of its first
token. BOS, EOS and other special tokens have no bytes, though their nats count. A character whose
bytes are divided between two windows counts as the replacement character, 3 bytes, where it is
cut. bits_per_byte is absent where there is no tokenizer; it may be compared between tokenizers.

Intervals are over documents (interval.py); a window counts for the document that it begins in.

An encoder-decoder has no windows: it is scored on every token of the right answer, given the
source (or the sound) and the tokens of the answer before it.
"""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from compressor.engines import Engine
from compressor.errors import CompressError
from compressor.measure.gold import answered
from compressor.measure.inputs import documents, fitting_length, heldout, refuse_nan
from compressor.measure.interval import estimate
from compressor.model.checkpoint import load_processor, read_task
from compressor.options import options
from compressor.training.pairs import IGNORED
from compressor.training.workbench import Batch, Workbench

TASKS = ("causal-lm", "seq2seq-lm", "speech-seq2seq")


@options
class Options:
    """How much text is scored, in which windows."""

    rows: int = Field(256, ge=1, description="windows scored, taken evenly from the split")
    length: int = Field(128, ge=2, description="tokens per window")
    batch: int = Field(8, ge=1, description="windows per forward pass")


def run(engine: Engine, options: Options, work: Workbench) -> dict[str, float]:
    """Score held-out windows.

    Returns:
        perplexity and bits_per_byte, each with _low, _high and _n (documents).

    Raises:
        CompressError: the model writes no text, or there is no held-out data.
    """
    task = read_task(engine.path)
    if task not in TASKS:
        raise CompressError(
            f"'{engine.path.name}' is no causal language model, nor does it answer in text, "
            "so it has no perplexity",
            "leave out perplexity; fidelity works for every model",
        )
    length = fitting_length(engine.path, options.length)
    processor = load_processor(engine.path)
    nats, tokens, sizes, owners, seen = [], [], [], [], 0
    for batch in heldout(work, options.rows, options.batch, length):
        logits = refuse_nan(engine.path, engine.outputs(batch)["logits"], batch)
        nats_B, tokens_B = _score(task, logits, batch)
        nats.append(nats_B)
        tokens.append(tokens_B)
        if processor is not None:
            sizes += [_bytes(row, first, processor) for row, first in _real(batch)]
        owners.append(documents(batch, seen))
        seen += len(nats_B)
    totals, owner = torch.cat(nats), torch.cat(owners)
    found = estimate(totals, torch.cat(tokens), owner).map(math.exp).keys("perplexity")
    if processor is not None and sum(sizes) > 0:
        bits = estimate(totals / math.log(2), torch.tensor(sizes), owner)
        found |= bits.keys("bits_per_byte")
    return found


def _score(task: str, logits_BSV: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Nats [B] float64 and scored tokens [B] of each window or answer."""
    found = answered(task, logits_BSV, batch)
    assert found is not None
    nats = [
        cross_entropy(row[keep].double(), target[keep], reduction="sum")
        for row, target, keep in zip(*found, strict=True)
    ]
    return torch.stack(nats), found[2].sum(dim=1)


def _real(batch: Batch) -> list[tuple[list[int], int]]:
    """Ids of every window and its first scored one; of an answer all are scored."""
    if "decoder_input_ids" in batch:
        return [(ids[ids != IGNORED].tolist(), 0) for ids in batch["labels"]]
    mask = batch["attention_mask"].bool()
    return [(ids[keep].tolist(), 1) for ids, keep in zip(batch["input_ids"], mask, strict=True)]


def _bytes(ids: list[int], first: int, processor: Any) -> int:
    """UTF-8 bytes of a window from its token `first` on."""

    def size(part: list[int]) -> int:
        text = processor.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode("utf-8"))

    return size(ids) - size(ids[:first])
