"""Cells of a results table: appended to docs/results/NAME.jsonl when done, skipped when present.

So a table grows over several sittings, and a script that is stopped loses one cell at most.
"""

import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressor.run.machine import machine, packages

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("COMPRESS_TEST_DATA", ROOT.parent / "shared"))
RESULTS = ROOT / "docs" / "results"


class Cells:
    """The cells of one page; a cell is a dict with its name, or number, under the key `cell`."""

    def __init__(self, name: str, folder: Path = RESULTS) -> None:
        self.file, self.page = folder / f"{name}.jsonl", folder / f"{name}.md"
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        self.found: dict[str | int, dict[str, Any]] = {c["cell"]: c for c in map(json.loads, lines)}

    def run(self, cell: str | int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell of that name, made and stored unless it is there."""
        if cell in self.found:
            print(f"{cell}: present, skipped", flush=True)
            return self.found[cell]
        print(f"{cell} ...", end=" ", flush=True)
        start = time.perf_counter()
        made = {"cell": cell} | make()
        made |= {"cell_seconds": round(time.perf_counter() - start, 1)} | circumstances()
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(made) + "\n")
        print(f"{made['cell_seconds']} s", flush=True)
        self.found[cell] = made
        return made

    def where(self) -> str:
        """Paragraphs for the page: dates, machine and versions, one for each set of them."""
        found: dict[str, list[str]] = {}
        for cell in self.found.values():
            found.setdefault(place(cell["machine"], cell["packages"]), []).append(cell["date"])
        spans = {text: dict.fromkeys((min(days), max(days))) for text, days in found.items()}
        lines = [f"{' to '.join(days)}; {text}" for text, days in spans.items()]
        return "\n\n".join(lines) or "not run"


def place(has: dict[str, Any], versions: dict[str, str]) -> str:
    """A machine and the versions of packages, for a page."""
    threads = f"{has['threads']} thread{'s' if has['threads'] != 1 else ''}"
    memory = f"{has['memory_bytes'] / 2**30:.0f} GiB"
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{has['cpu']}, {threads}, {memory}; {shown}"


def circumstances() -> dict[str, Any]:
    """Date, machine and versions, as every cell has them."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "packages": packages(),
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column reads from the left, the others from the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
