"""Where data comes from: .txt, .jsonl, .csv, images, clips, the standard library's own English.

What a source may be depends on what the model reads:

    text    .txt, .jsonl or .csv with the column text (and label), stdlib:MODULE
    pairs   .jsonl or .csv with the columns source and target, or question and answer
    audio   .jsonl or .csv with the columns audio (a file, relative to the table) and text
    images  a folder with a subfolder for each class, or with labels.csv; an MNIST idx file

In a .txt a blank line ends a document, unless the file has lines that are exactly <|endoftext|>,
as stand between the stories of TinyStories (arXiv 2305.07759) and other dumps. Then these lines
alone end a document, and blank lines are white space inside one: a story keeps its paragraphs. The
mark itself is never text: it is that of another tokenizer.
"""

import re
from pathlib import Path
from typing import Any, Literal

from compressor.errors import CompressError
from compressor.training.audio import read_clips
from compressor.training.documents import Document
from compressor.training.images import read_images
from compressor.training.stdlib import PREFIX, stdlib_texts
from compressor.training.tables import decode, read_records

Kind = Literal["text", "pairs", "audio", "images"]

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
_END_LINE = re.compile(r"^<\|endoftext\|>$", re.MULTILINE)
_PAIRS = (("source", "target"), ("question", "answer"))


def read_source(
    source: str, kind: Kind = "text", classes: dict[str, int] | None = None
) -> list[Document]:
    """Read one source; `classes` are the model's {name: number}, for folders of images.

    Raises:
        CompressError: missing, not UTF-8, malformed (with the line), without any content, or of
            another kind than the model reads.
    """
    if kind == "images":
        return read_images(Path(source), classes)
    if source.startswith(PREFIX) and kind == "text":
        found = [Document(text) for text in stdlib_texts(source.removeprefix(PREFIX))]
    elif kind == "text":
        found = _read_text(Path(source))
    else:
        found = _read_table(source, kind)
    found = [d for d in found if d.media or d.text.strip()]
    if not found:
        raise CompressError(f"'{source}' holds no text", "give a file with text in it")
    return found


def paragraphs(text: str) -> list[str]:
    """Split at blank lines; white space inside a paragraph is normalized."""
    return [" ".join(part.split()) for part in _BLANK_LINE.split(text) if part.strip()]


def _read_text(path: Path) -> list[Document]:
    if path.suffix not in (".txt", ".jsonl", ".csv"):
        raise CompressError(
            f"'{path}' is no text that is known here",
            "give a .txt, .jsonl or .csv file, or stdlib:MODULE",
        )
    if path.suffix == ".txt":
        text = decode(path)
        if _END_LINE.search(text):
            return [Document(part.strip()) for part in _END_LINE.split(text)]
        return [Document(part) for part in _BLANK_LINE.split(text.strip())]
    return [
        Document(text, label_of(f"{path.name}:{line}", label))
        for line, (text,), label in read_records(path, [("text",)])
    ]


def _read_table(source: str, kind: Kind) -> list[Document]:
    path = Path(source)
    if path.suffix not in (".jsonl", ".csv"):
        columns = "audio and text" if kind == "audio" else "source and target"
        raise CompressError(
            f"this model learns from {kind}, and '{source}' holds none",
            f"give a .jsonl or .csv file with the columns {columns}",
        )
    if kind == "audio":
        return read_clips(path)
    return [
        Document(text, target=target)
        for _, (text, target), _ in read_records(path, _PAIRS)
        if target.strip()
    ]


def label_of(where: str, value: Any) -> int | None:
    """A class number, or None.

    Raises:
        CompressError: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)):
        raise CompressError(
            f"{where}: label {value!r} is no class number", "write labels as 0, 1, 2, ..."
        )
    return int(value)
