"""Tasks whose model answers a row with tokens (T5, Whisper): what the tokens of answers cost.

Every token is predicted from the right ones before it. An answer of which every token is the most
likely one is therefore what greedy decoding writes, from start to end, and no other answer is.
"""

import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from compressor.model.forward import accepted, without_cache
from compressor.training.data import make_batches
from compressor.training.pairs import IGNORED


def beside(tokenizer):
    """A directory with a tokenizer, which a saved model takes along."""
    folder = Path(tempfile.mkdtemp())
    tokenizer.save_pretrained(folder)
    return folder


def answered(model, corpus, split, rows, length, reading):
    """(logits [B, T, V], labels [B, T]) of at most `rows` rows of a split, batch by batch."""
    shape = {"batch": 50, "length": length, "reading": reading, "task": corpus.task, "seed": 0}
    for batch in make_batches(corpus, model.processor, split, rows // 50, **shape):
        inputs = accepted(model, batch) | without_cache(model)
        yield model.module(**inputs).logits, batch["labels"]


@torch.no_grad()
def losses(model, *rows):
    """For every row of `answered`: (nats of its answer's tokens, how many)."""
    found = []
    for logits, labels in answered(model, *rows):
        nats = cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
        found += zip(nats.tolist(), (labels != IGNORED).sum(1).tolist(), strict=True)
    return found


@torch.no_grad()
def accuracy(model, *rows):
    """Share of rows whose answer is right from start to end."""
    right = [
        ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
        for logits, labels in answered(model, *rows)
    ]
    return float(torch.cat(right).float().mean())
