"""Where text comes from: .txt, .jsonl, .csv files and the standard library's own English.

A document is what is never divided between splits: a topic, a review, a paragraph of a .txt.
"""

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import CompressError
from compressor.options import nearest
from compressor.training.stdlib import PREFIX, stdlib_texts

_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")  # a lone surrogate: no UTF-8 holds it
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")


@dataclass(frozen=True)
class Document:
    """One text; `label` is the class number of labelled data.

    `rows` are the texts that become rows of a batch; empty until a corpus for encoders is made.
    """

    text: str
    label: int | None = None
    rows: tuple[str, ...] = ()

    @property
    def content(self) -> str:
        """The text with white space normalized: what makes two documents the same."""
        return " ".join(self.text.split())


def read_source(source: str) -> list[Document]:
    """Read one source F: a .txt, .jsonl or .csv file, or stdlib:MODULE.

    Raises:
        CompressError: missing, not UTF-8, malformed (with the line), or without any text.
    """
    if source.startswith(PREFIX):
        found = [Document(text) for text in stdlib_texts(source.removeprefix(PREFIX))]
    else:
        found = _read_file(Path(source))
    found = [document for document in found if document.text.strip()]
    if not found:
        raise CompressError(f"'{source}' holds no text", "give a file with text in it")
    return found


def paragraphs(text: str) -> list[str]:
    """Split at blank lines; white space inside a paragraph is normalized."""
    return [" ".join(part.split()) for part in _BLANK_LINE.split(text) if part.strip()]


def _read_file(path: Path) -> list[Document]:
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix not in readers:
        raise CompressError(
            f"'{path}' is no text that is known here",
            "give a .txt, .jsonl or .csv file, or stdlib:MODULE",
        )
    return readers[path.suffix](path.name, _decode(path))


def _decode(path: Path) -> str:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CompressError(
            f"data file '{path}' {what}{nearest(path.name, siblings)}", "--data FILE"
        )
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise CompressError(
            f"'{path}' is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}",
            f"iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}",
        ) from error


def _read_txt(name: str, text: str) -> list[Document]:
    return [Document(part) for part in _BLANK_LINE.split(text.strip())]


def _read_jsonl(name: str, text: str) -> list[Document]:
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise CompressError(
                f"{name}:{number}: not JSON ({error.msg})", 'one object per line: {"text": "..."}'
            ) from error
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            keys = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise CompressError(
                f'{name}:{number}: no "text" in this line (found: {keys})',
                'one object per line: {"text": "..."}',
            )
        if half := _HALF_CHARACTER.search(value["text"]):
            raise CompressError(
                f"{name}:{number}: {half.group()!r} is half of a character", "write the text again"
            )
        found.append(Document(value["text"], _label(name, number, value.get("label"))))
    return found


def _read_csv(name: str, text: str) -> list[Document]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a cell may be a long document
    table = csv.DictReader(io.StringIO(text, newline=""))
    if "text" not in (table.fieldnames or []):
        columns = ", ".join(table.fieldnames or [])[:80]
        raise CompressError(
            f"{name}: no column 'text' (first line: {columns})",
            "name the columns in the first line: text,label",
        )
    found = []
    for row in table:
        if row["text"] is None:
            raise CompressError(f"{name}:{table.line_num}: no text in this row", "fill the column")
        found.append(Document(row["text"], _label(name, table.line_num, row.get("label") or None)))
    return found


def _label(name: str, line: int, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)):
        raise CompressError(
            f"{name}:{line}: label {value!r} is no class number", "write labels as 0, 1, 2, ..."
        )
    return int(value)
