"""The numbers of a bench as tables: side by side, all of quality, speed by shape."""

from typing import Any

from compressor.run.tables import (
    ENGINES,
    Table,
    interval,
    megabytes,
    millions,
    quality_names,
    significant,
    threads,
)

_SCREEN = 96  # characters of a row, without the margins of a terminal table


def comparison(bench: dict[str, Any]) -> Table:
    """One row per candidate: size, memory, speed and the first quality."""
    candidates = bench["candidates"]
    names = quality_names(bench)
    units = {str(c["throughput"]["unit"]) for c in candidates if c.get("throughput")}
    unit = units.pop() if len(units) == 1 else "items/s"
    states = any("ours" in str(c["name"]) for c in candidates)  # names of a run say the engine
    p50 = "ms/token" if unit == "tokens/s" else "p50 ms"
    header = ("", *(() if states else ("engine",)), "params", "MB", "peak MB", p50, "p95 ms", unit)
    # with several qualities the intervals stand in a table of their own
    shown = interval if len(names) == 1 else _value
    rows = [
        (*_candidate_row(c, not states), *(shown(_quality(c).get(name)) for name in names[:1]))
        for c in candidates
    ]
    circumstances = threads(bench.get("threads"))
    if bench.get("noisy"):
        circumstances += "; the machine was BUSY, do not rely on ms"
    return Table(f"Side by side ({circumstances})", (*header, *names[:1]), rows)


def _candidate_row(candidate: dict[str, Any], engine: bool) -> tuple[str, ...]:
    latency = candidate.get("latency_ms") or {}
    return (
        str(candidate["name"]),
        *((ENGINES.get(candidate["engine"]) or str(candidate["engine"]),) if engine else ()),
        millions(candidate.get("parameters")),
        megabytes(candidate.get("bytes")),
        megabytes(candidate.get("peak_memory_bytes")),
        significant(latency.get("p50")),
        significant(latency.get("p95")),
        significant((candidate.get("throughput") or {}).get("value")),
    )


def _quality(candidate: dict[str, Any]) -> dict[str, Any]:
    return candidate.get("quality") or {}


def _value(found: dict[str, Any] | None) -> str:
    return interval({"value": (found or {}).get("value")})


def quality(bench: dict[str, Any]) -> list[Table]:
    """Every quality of every candidate, as many abreast as a screen has room for.

    Nothing where the main table has all of it already.
    """
    names = quality_names(bench)
    if len(names) < 2:
        return []
    labels = [str(c["name"]) for c in bench["candidates"]]
    columns = [
        (name, [interval(_quality(c).get(name)) for c in bench["candidates"]]) for name in names
    ]
    found: list[Table] = []
    room = 0
    for name, cells in columns:
        width = max(len(cell) for cell in (name, *cells)) + 2
        if width > room:
            found.append(Table("Quality on held-out documents", ("",), [(n,) for n in labels]))
            room = _SCREEN - max(len(label) for label in labels)
        last = found[-1]
        rows = [(*row, cell) for row, cell in zip(last.rows, cells, strict=True)]
        found[-1] = Table(last.title, (*last.header, name), rows)
        room -= width
    return found


def speed(bench: dict[str, Any]) -> Table | None:
    """Time to the first token by prompt length, or speed by batch size; None without either."""
    candidates = bench["candidates"]
    prompts = _sizes(candidates, "prefill_ms")
    if prompts:
        rows = [
            (str(c["name"]), *(significant((c.get("prefill_ms") or {}).get(n)) for n in prompts))
            for c in candidates
        ]
        header = ("", *(f"prompt of {n}" for n in prompts))
        return Table("Time to the first token, ms", header, rows)
    batches = _sizes(candidates, "batches")
    if not batches:
        return None
    rows = [
        (
            str(c["name"]),
            *(significant((c.get("batches") or {}).get(n, {}).get("p50")) for n in batches),
            *(significant((c.get("batches") or {}).get(n, {}).get("throughput")) for n in batches),
        )
        for c in candidates
    ]
    units = {str(c["throughput"]["unit"]) for c in candidates if c.get("throughput")}
    unit = units.pop() if len(units) == 1 else "rows/s"
    header = ("", *(f"ms, {n}" for n in batches), *(f"/s, {n}" for n in batches))
    return Table(f"Speed by rows per batch: ms per batch, {unit}", header, rows)


def _sizes(candidates: list[dict[str, Any]], key: str) -> list[str]:
    found = {size for c in candidates for size in c.get(key) or {}}
    return sorted(found, key=int)


def bench_tables(bench: dict[str, Any]) -> list[Table]:
    """What a bench says in numbers: side by side, all of quality, speed by shape."""
    by_shape = speed(bench)
    return [comparison(bench), *quality(bench), *([by_shape] if by_shape else [])]
