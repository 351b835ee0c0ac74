"""Data for training and measuring: sources, splits that share no document, batches.

The pieces are sources.py (files to documents), splits.py (documents to splits), rows.py, pairs.py,
images.py and audio.py (documents to rows), and batches.py and masking.py (rows to batches).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compressor.errors import CompressError
from compressor.training import splits
from compressor.training.audio import AudioRows, refuse_bad_clips
from compressor.training.batches import Readable, in_order, shuffled
from compressor.training.documents import Document
from compressor.training.images import ImageRows, class_names
from compressor.training.masking import masked
from compressor.training.pairs import answer_rows, pair_rows
from compressor.training.reading import TEXT, Reading
from compressor.training.rows import packed_rows, paragraph_rows, stream_of
from compressor.training.sources import Kind, read_source
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
        task: decides what a row of text is (see rows.py).
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

    def check(self, reading: Reading) -> None:
        """Look at the clips of every split, once.

        Raises:
            CompressError: one is empty, unreadable, or longer than the model hears.
        """
        plan = reading.audio
        if plan is not None and ("checked", plan.key) not in self._made:
            refuse_bad_clips((d for found in self.documents.values() for d in found), plan)
            self._made["checked", plan.key] = True

    def rows(self, split: str, processor: Any, length: int, reading: Reading = TEXT) -> Readable:
        """Rows of a split; kept, so that every stage of a run tokenizes once."""
        self.check(reading)
        documents = self.documents[split]
        same = "train" if documents is self.documents["train"] else split
        vocabulary = processor.get_vocab() if processor is not None else {}
        key = (same, len(vocabulary), hash(frozenset(vocabulary.items())))
        if self.task == "causal-lm":
            if key not in self._made:
                self._made[key] = stream_of(documents, processor)
            tokens, starts = self._made[key]
            return packed_rows(tokens, starts, length)
        key = (*key, length, reading.start, reading.image, reading.audio and reading.audio.key)
        if key not in self._made:
            self._made[key] = _rows(documents, processor, length, reading)
        return self._made[key]


def _rows(documents: list[Document], processor: Any, length: int, reading: Reading) -> Readable:
    if reading.image is not None:
        return ImageRows(documents, reading.image)
    if reading.start is None:
        return paragraph_rows(documents, processor, length)
    if reading.audio is None:
        return pair_rows(documents, processor, length, reading.start)
    answers = answer_rows(documents, processor, length, reading.start)
    return AudioRows(documents, answers, reading.audio, reading.start)


def load_corpus(
    spec: DataSpec, task: str, kind: Kind = "text", classes: dict[str, int] | None = None
) -> Corpus:
    """Read, deduplicate and split the data of a profile.

    Args:
        spec: sources of each split.
        task: causal-lm packs documents into windows; other tasks take a paragraph, or a whole
            labelled document, as a row.
        kind: what the model reads; a pair, an image or a clip is a document and a row.
        classes: {name: number} of a model that names its classes; otherwise folders of images
            are numbered in sorted order.

    Raises:
        CompressError: a source cannot be read, or there is too little distinct data.
    """
    named = {split: _listed(getattr(spec, split)) for split in splits.SPLITS}
    if not named["train"]:
        raise CompressError("data names no text to train on", "data: {train: [FILE]}")
    sources = dict.fromkeys(source for group in named.values() for source in group)
    given = {
        split: [document for source in group for document in read_source(source, kind, classes)]
        for split, group in named.items()
        if group
    }
    labelled = _labelled(given, task, kind)
    if not labelled:  # labels are for classifiers; the others read the text
        given = {k: [replace(d, label=None) for d in found] for k, found in given.items()}
    if kind == "images" and not classes:
        _refuse_other_classes([Path(source) for source in sources])
    documents = splits.split(given)
    if kind == "text" and task != "causal-lm":
        documents = splits.into_rows(documents, whole=labelled)
        _refuse_fragments(documents)
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
    least: int | None = None,
    reading: Reading = TEXT,
) -> Sequence[Batch]:
    """Batches of a split; batch i is a pure function of (seed, i).

    Args:
        processor: the tokenizer; images need none.
        split: train is shuffled and endless; the others run in order, once.
        n: batches at most; None is all of the split, one epoch for train.
        batch: rows per batch.
        length: tokens per row: exactly (causal-lm) or at most (other tasks; of a pair, each).
        least: rows that must be there; None is one batch of train, one row of the others.
        reading: how documents become inputs.

    Returns:
        A sequence of batches with row and document [B], and, int64 where nothing else is said,
        text: input_ids, attention_mask [B, S]; labels [B] of a classifier; of a masked language
            model labels [B, S], -100 where nothing is hidden
        pairs: also decoder_input_ids, decoder_attention_mask and labels [B, T], -100 at padding
        audio: input_features float32 [B, bands, frames] in place of the source text
        images: pixel_values float32 [B, C, H, W], and labels [B] where there are any

    Raises:
        CompressError: the split is too short for one batch to train on, or for one row.
    """
    assert task == corpus.task, f"the corpus was made for {corpus.task}"
    rows = corpus.rows(split, processor, length, reading)
    needed = least if least is not None else batch if split == "train" else 1
    if len(rows) < needed:
        raise CompressError(
            f"split '{split}' of {corpus.name} has {len(rows)} rows"
            f"{f' of {length} tokens' if task == 'causal-lm' else ''}, one batch needs {needed}",
            "give more text, or lower batch or length",
        )
    found = shuffled(rows, n, batch, seed) if split == "train" else in_order(rows, n, batch)
    return masked(found, processor, seed) if task == "fill-mask" else found


def _listed(sources: list[str] | str | None) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources or [])


def _labelled(given: dict[str, list[Document]], task: str, kind: Kind) -> bool:
    """Whether the rows are labelled documents; half-labelled data is a mistake."""
    marks = {d.label is not None for found in given.values() for d in found}
    if (task != "text-classification" and kind != "images") or marks == {False}:
        return False
    if len(marks) == 2:
        raise CompressError(
            "some documents have a label and some have none", "label all of them, or none"
        )
    return True


def _refuse_other_classes(folders: list[Path]) -> None:
    """Classes are numbered in sorted order, so all folders must have the same ones."""
    known = {path: class_names(path) for path in folders if path.is_dir()}
    for path, classes in known.items():
        first = next(iter(known))
        if classes != known[first]:
            raise CompressError(
                f"'{first.name}' has the classes {', '.join(known[first]) or 'of labels.csv'} and "
                f"'{path.name}' {', '.join(classes) or 'those of labels.csv'}",
                "give both the same subfolders; they may be empty",
            )


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
            parts = [split, str(document.label), splits.digest(document.text)]
            if document.target is not None:
                parts.append(splits.digest(document.target))
            if document.media is not None:
                parts.append(document.media.sha256)
            total.update((" ".join(parts) + "\n").encode())
    return total.hexdigest()
