"""What a report shows of a search: all candidates in a table, and their losses in a chart."""

from collections.abc import Iterator
from typing import Any

from compressor.run.front_svg import svg
from compressor.run.scatter import chart
from compressor.run.tables import MISSING, Table, clock, megabytes, millions, significant, threads


def search_tables(report: dict[str, Any]) -> Iterator[Table]:
    """One table per search stage, in the order in which candidates were trained."""
    for stage in report["stages"]:
        if found := (stage.get("notes") or {}).get("search"):
            yield _table(stage["name"], found)


def _table(name: str, found: dict[str, Any]) -> Table:
    timed = found.get("latency")
    title = f"Candidates of {name}"
    if timed:
        title += f" (ms: 1 row of {timed['length']} tokens, {threads(timed['threads'])})"
    header = ("candidate", "params", "MB", *(("ms",) if timed else ()))
    header += ("loss before", "after", "time", "")
    rows = [
        (
            row["name"],
            millions(row["parameters"]),
            megabytes(row["bytes"]),
            *((significant(row["latency_ms"]),) if timed else ()),
            _loss(row["before"]),
            _loss(row["after"]),
            clock(row["seconds"]),
            "chosen" if row["chosen"] else ("failed" if row["failed"] else ""),
        )
        for row in found["candidates"]
    ]
    return Table(title, header, rows)


def _loss(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def search_chart(stage: dict[str, Any]) -> tuple[str, str] | None:
    """(title, SVG) of loss against size, or latency where that was the budget; None for one dot."""
    found = (stage.get("notes") or {}).get("search")
    if not found:
        return None
    cost = "latency" if found.get("latency") else "bytes"
    points = [
        {
            "name": row["name"],
            "bytes": row["bytes"],
            "latency_ms": {"p50": row.get("latency_ms")},
            "quality": {"value": row["after"]} if row["after"] is not None else None,
            "front": [cost] if row["chosen"] else [],
            "made": True,
        }
        for row in found["candidates"]
    ]
    given = {"candidates": points, "quality": "validation loss", "lower_is_better": True}
    drawn = chart(given | {"runs": [{"task": found["task"]}]}, cost)
    picked = next(row["name"] for row in found["candidates"] if row["chosen"])
    title = f"{stage['name']}: candidates"
    return (title, svg(drawn, title, picked)) if drawn else None
