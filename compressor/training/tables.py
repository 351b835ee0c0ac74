"""Records of .jsonl and .csv files: named columns of text, and every way a line can be wrong."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compressor.errors import CompressError
from compressor.options import nearest

_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")  # a lone surrogate: no UTF-8 holds it

Record = tuple[int, dict[str, Any]]  # line, values
Columns = Sequence[tuple[str, ...]]  # sets of columns that would do; the first that is there counts


def read_records(
    path: Path, columns: Columns, numbers: Sequence[str] = ()
) -> Iterator[tuple[int, tuple[str, ...], Any]]:
    """Yield (line, the texts of one set of columns, label or None) of every record.

    Columns named in `numbers` may hold numbers of JSON, which come as text.

    Raises:
        CompressError: malformed, or a column is missing or no text (with the line).
    """
    reader = _jsonl if path.suffix == ".jsonl" else _csv
    for line, record in reader(path.name, decode(path), columns):
        chosen = next((c for c in columns if all(k in record for k in c)), columns[0])
        record |= {k: repr(record[k]) for k in numbers if type(record.get(k)) in (int, float)}
        texts = tuple(_text(path, line, record, column) for column in chosen)
        yield line, texts, record.get("label")


def decode(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        CompressError: missing, a folder, or not UTF-8.
    """
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


def _text(path: Path, line: int, record: dict[str, Any], column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        if path.suffix == ".csv":
            raise CompressError(f"{path.name}:{line}: no {column} in this row", "fill the column")
        raise CompressError(
            f'{path.name}:{line}: no "{column}" in this line (found: {", ".join(record)})',
            f'one object per line: {{"{column}": "..."}}',
        )
    if half := _HALF_CHARACTER.search(value):
        raise CompressError(
            f"{path.name}:{line}: {half.group()!r} is half of a character", "write the text again"
        )
    return value


def _jsonl(name: str, text: str, columns: Columns) -> Iterator[Record]:
    shape = ", ".join(f'"{column}": "..."' for column in columns[0])
    hint = f"one object per line: {{{shape}}}"
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number or a nesting without end, too
            why = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise CompressError(f"{name}:{number}: not JSON ({why})", hint) from error
        if not isinstance(value, dict):
            found = type(value).__name__
            raise CompressError(
                f'{name}:{number}: no "{columns[0][0]}" in this line (found: {found})', hint
            )
        yield number, value


def _csv(name: str, text: str, columns: Columns) -> Iterator[Record]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a cell may be a long document
    table = csv.DictReader(io.StringIO(text, newline=""))
    names = table.fieldnames or []
    if not any(set(wanted) <= set(names) for wanted in columns):
        missing = next(column for column in columns[0] if column not in names)
        raise CompressError(
            f"{name}: no column '{missing}' (first line: {', '.join(names)[:80]})",
            f"name the columns in the first line: {','.join(columns[0])}"
            + (",label" if columns[0] == ("text",) else ""),
        )
    for row in table:
        yield table.line_num, row | {"label": row.get("label") or None}
