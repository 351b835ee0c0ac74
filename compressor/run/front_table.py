"""The candidates of a comparison as rows of text, the fronts marked."""

from typing import Any

from compressor.run.tables import (
    ENGINES,
    Table,
    interval,
    lower_is_better,
    megabytes,
    millions,
    significant,
)

ON = {"bytes": "size", "latency": "speed"}


def front_table(found: dict[str, Any]) -> Table:
    """One row per candidate, best quality first; the pick has an arrow."""
    header = ("", "engine", "params", "MB", "ms", found["quality"], "front")
    rows = [
        (
            f"{c['name']}{'  ←' if c['name'] == found['picked'] else ''}",
            ENGINES.get(c["engine"]) or str(c["engine"]),
            millions(c["parameters"]),
            megabytes(c["bytes"]),
            significant((c["latency_ms"] or {}).get("p50")),
            interval(c["quality"]),
            ", ".join(ON[cost] for cost in c["front"]) or "-",
        )
        for c in in_order(found)
    ]
    return Table("Quality against size and speed", header, rows)


def in_order(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Best quality first, then small before large; without a quality at the end."""
    sign = 1 if lower_is_better(found["quality"]) else -1

    def rank(c: dict[str, Any]) -> tuple[bool, float, float]:
        value = (c["quality"] or {}).get("value")
        return value is None, sign * float(interval({"value": value or 0.0})), c["bytes"]

    return sorted(found["candidates"], key=rank)


def cost_of(candidate: dict[str, Any], cost: str) -> float | None:
    """Bytes on disk, or median milliseconds where they can be compared."""
    if cost == "bytes":
        return candidate["bytes"]
    return (candidate["latency_ms"] or {}).get("p50")
