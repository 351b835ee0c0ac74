"""Which charts a report shows: before and after, importance, loss. How to draw is in plots.py."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compressor.run.plots import Bar, columns, curve, heatmap, horizontal_bars
from compressor.run.tables import interval, megabytes, quality_names, significant
from compressor.run.verdict import is_ours


@dataclass(frozen=True)
class Figure:
    """A title, an inline SVG and one sentence that says how to read it."""

    title: str
    svg: str
    caption: str


def figures(report: dict[str, Any]) -> list[Figure]:
    """Every chart that the report has numbers for, in reading order."""
    found = list(_before_after(report["bench"])) if report.get("bench") else []
    for stage in report["stages"]:
        found += [*_importance(stage), *_loss(stage)]
    return found


def _before_after(bench: dict[str, Any]) -> Iterator[Figure]:
    candidates = bench["candidates"]
    sizes = [(c, c.get("bytes"), f"{megabytes(c.get('bytes'))} MB") for c in candidates]
    yield from _bars("Size on disk", sizes, "Shorter is better.")
    times = [(c, (c.get("latency_ms") or {}).get("p50")) for c in candidates]
    rows = [(c, ms, f"{significant(ms)} ms") for c, ms in times]
    busy = " The machine was busy: do not rely on it." if bench.get("noisy") else ""
    yield from _bars("Latency, median", rows, f"Shorter is better.{busy}")
    for name in quality_names(bench)[:3]:
        marks = [
            Bar(
                label=str(c["name"]),
                value=q["value"] or 0.0,
                text=interval(q),
                low=q.get("low"),
                high=q.get("high"),
                style=_style(c),
            )
            for c in candidates
            if (q := (c.get("quality") or {}).get(name)) and (q["value"] or 0.0) >= 0
        ]
        if marks:
            caption = "On held-out documents; the whisker is the interval."
            yield Figure(name, horizontal_bars(name, marks), caption)


def _bars(title: str, rows: list[tuple[dict, float | None, str]], caption: str) -> Iterator[Figure]:
    marks = [
        Bar(str(c["name"]), value, text, style=_style(c))
        for c, value, text in rows
        if value is not None
    ]
    if marks:
        yield Figure(title, horizontal_bars(title, marks), caption)


def _style(candidate: dict[str, Any]) -> str:
    return "ours" if is_ours(candidate) else "other"


def _importance(stage: dict[str, Any]) -> Iterator[Figure]:
    notes = stage.get("notes") or {}
    scores = notes.get("importance") or {}
    layers = scores.get("layers")
    if layers:
        kept = notes.get("kept_layers", range(len(layers)))
        bars = [
            Bar(str(i), max(v, 0.0), f"{v:.4g}", style="ours" if i in kept else "gone")
            for i, v in enumerate(layers)
        ]
        title = f"{stage['name']}: importance of layers"
        yield Figure(title, columns(title, bars, "layer"), "Grey layers were removed.")
    for axis, what in (
        ("neurons", "MLP neurons, sorted from least to most important"),
        ("heads", "attention heads"),
    ):
        rows = [(f"layer {i}", row) for i, row in enumerate(scores.get(axis) or [])]
        if rows:
            title = f"{stage['name']}: importance of {axis}"
            caption = "Stronger colour is more important; every layer has its own scale."
            yield Figure(title, heatmap(title, rows, what), caption)


def _loss(stage: dict[str, Any]) -> Iterator[Figure]:
    points = [(x, y) for x, y in (stage.get("notes") or {}).get("loss") or [] if y is not None]
    if len(points) > 1:
        title = f"{stage['name']}: training loss"
        caption = f"First {points[0][1]:.4g}, last {points[-1][1]:.4g}; the line is a running mean."
        yield Figure(title, curve(title, points, "step"), caption)
