"""How results look in a terminal: the only place that knows Rich's tables."""

import json
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from compressor.run.tables import Table

WIDTH = 100  # of a table that goes to a file or a pipe


def console() -> Console:
    """A console on the present stdout; colours only on a terminal and without NO_COLOR."""
    found = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    if not found.is_terminal:
        found.width = WIDTH
    return found


def show_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def show_lines(*lines: str) -> None:
    """Plain lines on stdout, never wrapped: paths and code stay copyable."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def show_text(text: str) -> None:
    """A sentence, wrapped to the width."""
    console().print(Text(text))


def show_table(table: Table) -> None:
    """A table; cells are text, never markup."""
    drawn = RichTable(
        title=Text(table.title, "bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_header=any(table.header),
    )
    for index, name in enumerate(table.header):
        left = index == 0 or table.prose
        drawn.add_column(Text(name), justify="left" if left else "right", overflow="fold")
    for row in table.rows:
        style = "bold" if row[0].startswith("ours") else None
        drawn.add_row(*(Text(cell) for cell in row), style=style)
    console().print(drawn)
