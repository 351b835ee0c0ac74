"""metrics.jsonl: one line per few steps of training, and the loss curve read from it."""

import json
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"
_POINTS = 300  # of a curve: enough for a plot


def append(folder: Path, record: dict[str, Any]) -> None:
    """Add one line."""
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def cut_back(folder: Path, step: int) -> None:
    """Forget what came after `step`; a line that was half-written goes too."""
    kept = [json.dumps(record) + "\n" for record in read(folder) if record["step"] <= step]
    partial = folder / f"{NAME}.partial"
    partial.write_text("".join(kept), encoding="utf-8")
    partial.rename(folder / NAME)


def loss_curve(folder: Path) -> list[list[float]]:
    """[[step, loss], ...]; see `curve`."""
    return curve(folder, "loss")


def curve(folder: Path, name: str) -> list[list[float]]:
    """[[step, value], ...], thinned to a few hundred points; the last one stays."""
    records = [record for record in read(folder) if name in record]
    stride = -(-len(records) // _POINTS) or 1
    kept = records[::-1][::stride][::-1]
    return [[record["step"], record[name]] for record in kept]


def read(folder: Path) -> list[dict[str, Any]]:
    """Every whole line."""
    file = folder / NAME
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # what ends without a newline is cut
    return [json.loads(line) for line in lines]
