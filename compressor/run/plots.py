"""Small inline SVG charts, without a plotting library.

Colours come from the page's CSS variables, so that one chart serves light and dark. Every mark
carries a <title>, which browsers show as a tooltip. All text is escaped here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 460
ROW = 26  # height of a horizontal bar with its gap
MAX_POINTS = 400
STYLE = """
svg text{font-size:12px;fill:var(--ink)}svg .soft{fill:var(--soft)}
svg .end{text-anchor:end}svg .middle{text-anchor:middle}svg .start{text-anchor:start}
.ours{fill:var(--ours)}.other{fill:var(--other)}.gone{fill:var(--gone)}
.grid{stroke:var(--line);fill:none}.whisker{stroke:var(--ink);stroke-width:1.5;fill:none}
.raw{stroke:var(--other);opacity:.55;fill:none}
.mean{stroke:var(--ours);stroke-width:2;fill:none;stroke-linejoin:round}
"""


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its value, the text beside it and optionally an interval."""

    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    style: str = "other"  # ours | other | gone: a CSS class


def horizontal_bars(title: str, bars: Sequence[Bar]) -> str:
    """Labelled horizontal bars from zero, with whiskers where an interval is given."""
    left, right = 140, 140
    height = 8 + ROW * len(bars)
    top = max((b.high if b.high is not None else b.value) for b in bars) or 1.0
    scale = (WIDTH - left - right) / top
    body = "".join(_bar(bar, 4 + ROW * i, left, scale) for i, bar in enumerate(bars))
    return _svg(title, height, body)


def _bar(bar: Bar, y: int, left: int, scale: float) -> str:
    width = max(bar.value * scale, 1.0)
    middle = y + ROW / 2 - 2
    shown = bar.label if len(bar.label) <= 22 else f"{bar.label[:21]}…"
    marks = [
        f"<g><title>{escape(f'{bar.label}: {bar.text}')}</title>",
        f'<text x="{left - 8}" y="{middle + 4:.1f}" class="end">{escape(shown)}</text>',
        f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{ROW - 6}" rx="2" '
        f'class="{bar.style}"/>',
    ]
    end = left + width
    if bar.low is not None and bar.high is not None:
        a, b = left + bar.low * scale, left + bar.high * scale
        end = max(end, b)
        marks.append(f'<path d="M{a:.1f} {middle:.1f}H{b:.1f}" class="whisker"/>')
    marks.append(f'<text x="{end + 6:.1f}" y="{middle + 4:.1f}">{escape(bar.text)}</text></g>')
    return "".join(marks)


def columns(title: str, bars: Sequence[Bar], x_label: str) -> str:
    """Vertical bars from zero, up or down, in order, such as one per layer."""
    left, top, height = 46, 12, 170
    low, high = (end(0.0, *(b.value for b in bars)) for end in (min, max))
    span = (high - low) or 1.0
    step = (WIDTH - left - 10) / len(bars)

    def down(value: float) -> float:
        return top + height * (low + span - value) / span

    marks = [_grid(_ticks(low, low + span), down, left)]
    for i, bar in enumerate(bars):
        upper, size = down(max(bar.value, 0.0)), height * abs(bar.value) / span
        x = left + step * i + step * 0.15
        marks.append(
            f"<g><title>{escape(f'{bar.label}: {bar.text}')}</title>"
            f'<rect x="{x:.1f}" y="{upper:.1f}" width="{step * 0.7:.1f}" '
            f'height="{size:.1f}" rx="2" class="{bar.style}"/>'
            f'<text x="{x + step * 0.35:.1f}" y="{top + height + 16}" class="middle">'
            f"{escape(bar.label)}</text></g>"
        )
    marks.append(_x_label(x_label, top + height + 34))
    return _svg(title, top + height + 42, "".join(marks))


def curve(title: str, points: Sequence[tuple[float, float]], x_label: str) -> str:
    """A noisy series, thinned to what the eye can see, with its running mean."""
    left, top, height = 56, 12, 190
    points = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
    raw, mean = _thin(points), _thin(_running_mean(points))
    low, high = min(y for _, y in raw), max(y for _, y in raw)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first, last = raw[0][0], raw[-1][0]

    def across(x: float) -> float:
        return left + (WIDTH - left - 10) * (x - first) / ((last - first) or 1.0)

    def down(y: float) -> float:
        return top + height * (1 - (y - low) / ((high - low) or 1.0))

    def path(series: Sequence[tuple[float, float]], style: str) -> str:
        text = "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in series)
        return f'<path d="M{text}" class="{style}"/>'

    labels = "".join(
        f'<text x="{across(x):.1f}" y="{top + height + 16}" class="{anchor}">{x:g}</text>'
        for x, anchor in ((first, "start"), (last, "end"))
    )
    body = _grid(ticks, down, left) + path(raw, "raw") + path(mean, "mean") + labels
    return _svg(title, top + height + 42, body + _x_label(x_label, top + height + 34))


def heatmap(title: str, rows: Sequence[tuple[str, Sequence[float]]], x_label: str) -> str:
    """One row of cells per label; each row is scaled by its own largest value."""
    left, cell = 70, 18
    marks = []
    for i, (label, values) in enumerate(rows):
        top, y = max(values) or 1.0, 4 + cell * i
        step = (WIDTH - left - 10) / len(values)
        marks.append(f'<text x="{left - 8}" y="{y + 13}" class="end">{escape(label)}</text>')
        marks.extend(
            f'<rect x="{left + step * j:.1f}" y="{y}" width="{step + 0.3:.1f}" '
            f'height="{cell - 2}" class="ours" opacity="{max(value / top, 0.0) * 0.95 + 0.05:.2f}">'
            f"<title>{escape(f'{label}: {value:.4g}')}</title></rect>"
            for j, value in enumerate(values)
        )
    height = 4 + cell * len(rows)
    return _svg(title, height + 26, "".join(marks) + _x_label(x_label, height + 16))


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential mean over about a twentieth of the series."""
    rate, mean, found = 2 / (max(len(points) // 20, 1) + 1), points[0][1], []
    for x, y in points:
        mean += rate * (y - mean)
        found.append((x, mean))
    return found


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    stride = max(math.ceil(len(points) / MAX_POINTS), 1)
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that lie inside [low, high]."""
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= 5)
    start = math.ceil(low / step - 1e-9)
    found = [round((start + i) * step, 12) for i in range(7) if (start + i) * step <= high + 1e-12]
    return found or [low]


def _grid(ticks: Sequence[float], down: Callable[[float], float], left: int) -> str:
    return "".join(
        f'<path d="M{left} {down(v):.1f}H{WIDTH - 10}" class="grid"/>'
        f'<text x="{left - 6}" y="{down(v) + 4:.1f}" class="end">{v:g}</text>'
        for v in ticks
    )


def _x_label(text: str, y: float) -> str:
    return f'<text x="{WIDTH / 2:.0f}" y="{y:.0f}" class="middle soft">{escape(text)}</text>'


def _svg(title: str, height: float, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"{body}</svg>"
    )
