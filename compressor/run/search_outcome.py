"""What became of the candidates of a search, as their directories and the winner's notes say."""

import json
import math
from pathlib import Path
from typing import Any

from compressor.errors import CompressError
from compressor.model.manifest import read_manifest
from compressor.run.layout import stage_name

FAILED = "failed.json"  # of a candidate whose training gave NaN, or that was refused


def outcome(home: Path, method: str) -> dict[str, Any]:
    """What became of a candidate: {before, after (losses), seconds, peak_memory_bytes, failed}."""
    if (home / FAILED).is_file():
        what = json.loads((home / FAILED).read_text(encoding="utf-8"))["what"]
        return {"before": None, "after": None, "seconds": None, "failed": what}
    manifest = read_manifest(home / stage_name(2, method))
    notes, records = manifest.metrics["notes"], manifest.stages[-2:]
    assert "validation" in notes, f"{method} notes no validation loss"
    losses = notes["validation"]
    finite = math.isfinite(losses["after"])
    return {
        "before": losses["before"],
        "after": losses["after"] if finite else None,
        "seconds": sum(record.seconds for record in records),
        "peak_memory_bytes": max(record.peak_memory_bytes for record in records),
        "failed": None if finite else "the validation loss is not finite",
    }


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The least validation loss; the earlier of equals.

    Raises:
        CompressError: every candidate failed.
    """
    able = [row for row in rows if row["failed"] is None]
    if not able:
        raise CompressError(
            f"all {len(rows)} candidates of the search failed; the first: {rows[0]['failed']}",
            "lower train.lr or raise train.warmup of the search stage",
        )
    return min(able, key=lambda row: row["after"])


def earlier_seconds(notes: dict[str, Any]) -> float:
    """What earlier attempts at a stage took, by its notes; 0 for what is no search."""
    return notes.get("search", {}).get("earlier_seconds", 0.0)


def peak_of(notes: dict[str, Any]) -> int:
    """The highest peak memory of the candidates in a stage's notes, bytes; 0 for other stages."""
    rows = notes.get("search", {}).get("candidates", [])
    return max((row.get("peak_memory_bytes") or 0 for row in rows), default=0)
