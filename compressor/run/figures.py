"""Which charts a report shows: before and after, importance, loss. How to draw is in plots.py."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compressor.run.plots import Bar, columns, curve, heatmap, horizontal_bars
from compressor.run.search_report import search_chart
from compressor.run.tables import (
    FIDELITY,
    interval,
    lower_is_better,
    megabytes,
    quality_names,
    significant,
)
from compressor.run.verdict import roles

# what a score of a layer, or of a window of layers, is
_RANKINGS = {
    "block_influence": "Block influence: 1 - cosine of input and output",
    "perplexity": "Cross-entropy without it",
    "accuracy": "Share of right answers lost without it",
    "output": "1 - cosine of the last hidden states with and without it",
}

_CURVES = {
    "loss": "training loss",
    "validation_loss": "loss on validation rows",
    "flip_rate": "share of the mask that changed when it was chosen again",
}


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
        found += [*_search(stage), *_importance(stage), *_curves(stage)]
    return found


def _before_after(bench: dict[str, Any]) -> Iterator[Figure]:
    candidates = list(zip(bench["candidates"], _styles(bench), strict=True))
    sizes = [
        Bar(str(c["name"]), c["bytes"], f"{megabytes(c['bytes'])} MB", style=style)
        for c, style in candidates
        if c.get("bytes") is not None
    ]
    times = [
        Bar(str(c["name"]), c["latency_ms"]["p50"], f"{significant(ms)} ms", style=style)
        for c, style in candidates
        if (ms := (c.get("latency_ms") or {}).get("p50")) is not None
    ]
    busy = " The machine was busy: do not rely on it." if bench.get("noisy") else ""
    yield from _bars("Size on disk", sizes, "Shorter is better.")
    yield from _bars("Latency, median", times, f"Shorter is better.{busy}")
    for name in [n for n in quality_names(bench) if n in FIDELITY][:3]:
        marks = [
            Bar(str(c["name"]), q["value"] or 0.0, interval(q), q.get("low"), q.get("high"), style)
            for c, style in candidates
            if (q := (c.get("quality") or {}).get(name)) and (q["value"] or 0.0) >= 0
        ]
        better = "shorter" if lower_is_better(name) else "longer"
        caption = f"On held-out documents, {better} is better; the whisker is the interval."
        yield from _bars(name, marks, caption)


def _bars(title: str, bars: list[Bar], caption: str) -> Iterator[Figure]:
    if bars:
        yield Figure(title, horizontal_bars(title, bars), caption)


def _styles(bench: dict[str, Any]) -> list[str]:
    """A CSS class per candidate: what is judged stands out from what it is compared with."""
    judged, _ = roles(bench)
    return ["ours" if any(c is j for j in judged) else "other" for c in bench["candidates"]]


def _importance(stage: dict[str, Any]) -> Iterator[Figure]:
    notes = stage.get("notes") or {}
    scores = notes.get("importance") or {}
    yield from _depth(stage["name"], scores.get("depth") or [], notes.get("kept_layers"))
    for axis, what in (
        ("neurons", "MLP neurons, sorted from least to most important"),
        ("heads", "attention heads"),
    ):
        rows = [(f"layer {i}", row) for i, row in enumerate(scores.get(axis) or [])]
        if rows:
            title = f"{stage['name']}: importance of {axis}"
            caption = "Stronger colour is more important; every layer has its own scale."
            yield Figure(title, heatmap(title, rows, what), caption)
    if hidden := scores.get("hidden"):
        title = f"{stage['name']}: importance of residual channels"
        what = "channels of the residual stream, sorted from least to most important"
        chart = heatmap(title, [("all layers", hidden)], what)
        yield Figure(title, chart, "Stronger colour is more important.")


def _depth(stage: str, depth: list[dict[str, Any]], kept: list[int] | None) -> Iterator[Figure]:
    """What decided which layers went, one chart for each stack."""
    start = 0  # the decoder's layers count on after the encoder's
    for stack in depth:
        values, n = stack["scores"], stack["window"]
        layers = len(values) + n - 1
        gone = [i for i in range(layers) if kept is not None and start + i not in kept]
        marked = gone if n == 1 else gone[:1]  # a window stands at its first layer
        bars = [
            Bar(str(i), v, f"{v:.4g}", style="gone" if i in marked else "ours")
            for i, v in enumerate(values)
            if v is not None
        ]
        whose = f", {stack['blocks']}" if len(depth) > 1 else ""
        title = f"{stage}: importance of layers{whose}"
        axis = "layer" if n == 1 else f"first of {n} layers"
        what = "layers were" if n == 1 else "window was"
        ranking = _RANKINGS.get(stack["ranking"], stack["ranking"])
        removed = f"The grey {what} removed." if gone else "No layer was removed."
        caption = f"{ranking}. {removed}"
        start += layers
        if bars:
            yield Figure(title, columns(title, bars, axis), caption)


def _search(stage: dict[str, Any]) -> Iterator[Figure]:
    if drawn := search_chart(stage):
        yield Figure(*drawn, "After light retraining; up and left is better.")


def _curves(stage: dict[str, Any]) -> Iterator[Figure]:
    """What a training logged, over its steps."""
    for note, what in _CURVES.items():
        values = (stage.get("notes") or {}).get(note) or []
        points = [(x, y) for x, y in values if y is not None]
        if len(points) > 1:
            first, last = (points[i][1] for i in (0, -1))
            caption = f"First {first:.4g}, last {last:.4g}; the line is a running mean."
            yield Figure(f"{stage['name']}: {what}", curve(what, points, "step"), caption)
