"""Text for training and measuring: sources, splits that share no document, batches.

The pieces are sources.py and stdlib.py (files to documents), splits.py (documents to splits),
rows.py (documents to tokens) and batches.py (tokens to batches).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compressor.errors import CompressError
from compressor.training import splits
from compressor.training.batches import in_order, shuffled
from compressor.training.rows import Rows, packed_rows, paragraph_rows, stream_of
from compressor.training.sources import Document, read_source
from compressor.training.stdlib import PREFIX
from compressor.training.workbench import Batch


@dataclass(frozen=True)
class DataSpec:
    """Sources of each split, as written in a profile; None is taken out of train."""

    train: list[str] | str | None = None
    calibration: list[str] | str | None = None
    validation: list[str] | str | None = None
    heldout: list[str] | str | None = None


@dataclass(frozen=True)
class Corpus:
    """Documents by split: train, calibration (part of train), validation, heldout.

    Attributes:
        name: the sources, without folders.
        sha256: of the content of every split, in order.
        task: decides what a row is (see rows.py).
        documents: {split: documents}, distinct, in the order of their content hash.
    """

    name: str
    sha256: str
    task: str
    documents: dict[str, list[Document]]
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """{split: {documents, rows, characters}}; rows are 0 for decoders."""
        return {
            name: {
                "documents": len(found),
                "rows": sum(len(d.rows) for d in found),
                "characters": sum(len(d.text) for d in found),
            }
            for name, found in self.documents.items()
        }

    def rows(self, split: str, processor: Any, length: int) -> Rows:
        """Tokenized rows of a split; kept, so that every stage of a run tokenizes once."""
        documents = self.documents[split]
        same = "train" if documents is self.documents["train"] else split
        key = (same, len(processor), hash(frozenset(processor.get_vocab().items())))
        if self.task == "causal-lm":
            if key not in self._made:
                self._made[key] = stream_of(documents, processor)
            tokens, starts = self._made[key]
            return packed_rows(tokens, starts, length)
        if (*key, length) not in self._made:
            self._made[*key, length] = paragraph_rows(documents, processor, length)
        return self._made[*key, length]


def load_corpus(spec: DataSpec, task: str) -> Corpus:
    """Read, deduplicate and split the texts of a profile.

    Args:
        spec: sources of each split.
        task: causal-lm packs documents into windows; other tasks take a paragraph, or a whole
            labelled document, as a row.

    Raises:
        CompressError: a source cannot be read, or there is too little distinct text.
    """
    named = {split: _listed(getattr(spec, split)) for split in splits.SPLITS}
    if not named["train"]:
        raise CompressError("data names no text to train on", "data: {train: [FILE]}")
    given = {
        split: [document for source in sources for document in read_source(source)]
        for split, sources in named.items()
        if sources
    }
    if task != "text-classification":  # labels are for classifiers; the others read the text
        given = {k: [replace(d, label=None) for d in found] for k, found in given.items()}
    documents = splits.split(given)
    if task != "causal-lm":
        documents = splits.into_rows(documents, whole=_labelled(documents, task))
        _refuse_fragments(documents)
    sources = dict.fromkeys(source for group in named.values() for source in group)
    return Corpus(
        name=", ".join(s if s.startswith(PREFIX) else Path(s).name for s in sources),
        sha256=_fingerprint(documents),
        task=task,
        documents=documents,
    )


def make_batches(
    corpus: Corpus,
    processor: Any,
    split: str,
    n: int | None,
    *,
    task: str,
    seed: int,
    batch: int = 8,
    length: int = 128,
) -> Sequence[Batch]:
    """Batches of a split; batch i is a pure function of (seed, i).

    Args:
        processor: the tokenizer.
        split: train is shuffled and endless; the others run in order, once.
        n: batches at most; None is all of the split, one epoch for train.
        batch: rows per batch.
        length: tokens per row: exactly (causal-lm) or at most (other tasks).

    Returns:
        A sequence of {input_ids, attention_mask [B, S], row, document [B], labels [B]?}, int64.

    Raises:
        CompressError: the split is too short for one batch to train on, or for one row.
    """
    assert task == corpus.task, f"the corpus was made for {corpus.task}"
    rows = corpus.rows(split, processor, length)
    needed = batch if split == "train" else 1
    if len(rows) < needed:
        raise CompressError(
            f"split '{split}' of {corpus.name} has {len(rows)} rows of {length} tokens, "
            f"one batch needs {needed}",
            "give more text, or lower batch or length",
        )
    return shuffled(rows, n, batch, seed) if split == "train" else in_order(rows, n, batch)


def _listed(sources: list[str] | str | None) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources or [])


def _labelled(documents: dict[str, list[Document]], task: str) -> bool:
    """Whether the rows are labelled documents; half-labelled data is a mistake."""
    marks = {d.label is not None for found in documents.values() for d in found}
    if task != "text-classification" or marks == {False}:
        return False
    if len(marks) == 2:
        raise CompressError(
            "some documents have a label and some have none", "label all of them, or none"
        )
    return True


def _refuse_fragments(documents: dict[str, list[Document]]) -> None:
    for split, found in documents.items():
        if not any(d.rows for d in found):
            raise CompressError(
                f"split '{split}' has no paragraph of {splits.SHORTEST} characters that no other "
                "split has",
                "give longer or more texts",
            )


def _fingerprint(documents: dict[str, list[Document]]) -> str:
    total = hashlib.sha256()
    for split in splits.SPLITS:
        for document in documents[split]:
            total.update(f"{split} {document.label} {splits.digest(document.text)}\n".encode())
    return total.hexdigest()
