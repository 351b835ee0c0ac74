"""Divide documents into splits that share no text, image or clip.

Duplicates go first. Documents are then ranked by the hash of what is read: the last 8 % are
held out, the 4 % before them validate, the rest trains, whatever order the files came in. All
answers to one text or clip stay together. One single document is cut into windows and divided by
position instead.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from itertools import groupby

from compressor.errors import CompressError
from compressor.training.documents import Document
from compressor.training.sources import paragraphs

SPLITS = ("heldout", "validation", "train", "calibration")  # a text goes to the first that has it
SHARES = {"heldout": 0.08, "validation": 0.04}
WINDOW = 1000  # characters of one window of a single document
SHORTEST = 20  # characters of a paragraph worth a row


def digest(text: str) -> str:
    """SHA-256 of a text as it is; callers normalize white space."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def split(given: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """Fill the splits that are not given out of train; calibration is train unless given.

    Args:
        given: documents of `train` and perhaps of other splits.

    Raises:
        CompressError: too few distinct documents for the splits, or nothing left in one.
    """
    found: dict[str, list[Document]] = {}
    for name in SPLITS:
        if name == "calibration":  # last: what was taken out of train must not come back here
            _take_from_train(found)
        if name in given:
            held = {digest(d.source) for share in SHARES for d in found.get(share, [])}
            found[name] = _fresh_documents(name, given[name], held)
    found.setdefault("calibration", found["train"])
    return found


def into_rows(documents: dict[str, list[Document]], whole: bool) -> dict[str, list[Document]]:
    """Give every document its rows, each text once in all splits together.

    Args:
        documents: of every split.
        whole: a labelled document is one row; otherwise every paragraph is one.
    """
    seen: set[str] = set()
    found: dict[str, list[Document]] = {}
    for name in SPLITS:
        if name == "calibration" and documents[name] is documents["train"]:
            found[name] = found["train"]
            continue
        mine = set(seen)
        found[name] = [
            dataclasses.replace(d, rows=tuple(_fresh(_row_texts(d, whole), mine)))
            for d in documents[name]
        ]
        if name in SHARES:
            seen = mine
    return found


def _row_texts(document: Document, whole: bool) -> list[str]:
    if whole:
        return [document.content]
    return [text for text in paragraphs(document.text) if len(text) >= SHORTEST]


def _fresh(texts: Iterable[str], seen: set[str]) -> Iterable[str]:
    for text in texts:
        key = digest(text)
        if key not in seen:
            seen.add(key)
            yield text


def _fresh_documents(name: str, given: list[Document], held: set[str]) -> list[Document]:
    """Distinct documents of a split, by hash; the windows of a single one, by position."""
    single = len(given) == 1 and given[0].target is None and given[0].media is None
    keyed = {digest(d.content): d for d in (_windows(given[0]) if single else given)}
    fresh = {key: d for key, d in keyed.items() if digest(d.source) not in held}
    if not fresh:
        raise CompressError(
            f"nothing is left for the split '{name}' after removing duplicates",
            "give it documents that no other split has",
        )
    if single:
        return list(fresh.values())
    return [fresh[key] for key in sorted(fresh, key=lambda key: (digest(fresh[key].source), key))]


def _take_from_train(found: dict[str, list[Document]]) -> None:
    """Move the last documents of train to the splits that are missing, a source at a time."""
    missing = [name for name in SHARES if name not in found]
    total = len(found["train"])
    groups = [list(group) for _, group in groupby(found["train"], key=lambda d: d.source)]
    if len(groups) <= len(missing):
        aside = "" if len(groups) == total else f" (of {total}, answers aside)"
        raise CompressError(
            f"{len(groups)} distinct documents{aside} are too few for train, validation and "
            "held-out data",
            "give more documents, or name files for validation and heldout",
        )
    for left, name in zip(range(len(missing), 0, -1), missing, strict=True):
        taken, size = [], 0
        # one group stays for every split that follows, however large the groups are
        while size < max(1, round(total * SHARES[name])) and len(groups) > left:
            taken.append(groups.pop())
            size += len(taken[-1])
        found[name] = [document for group in reversed(taken) for document in group]
    found["train"] = [document for group in groups for document in group]


def _windows(document: Document) -> list[Document]:
    """Pieces of at most WINDOW characters, cut at white space where there is any."""
    pieces = re.findall(rf"(?s)\S.{{0,{WINDOW - 1}}}(?=\s|$)|\S.{{{WINDOW - 1}}}", document.text)
    return [Document(piece, document.label) for piece in pieces]
