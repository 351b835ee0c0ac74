"""Where points, labels and ticks of a quality-against-cost chart go. SVG and PNG share this.

The cost axis is logarithmic, so that twice as large is always the same distance; better quality is
always up, also where a smaller number is better. Labels are put where they cover nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from compressor.run.front_table import cost_of
from compressor.run.tables import interval, significant

WIDTH, HEIGHT = 560, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 52  # margins around the plot
RADIUS = 6
LETTER, LINE = 6.6, 15  # width of an average letter and height of a line at 12 pixels
PER = {"causal-lm": "token", "image-classification": "image"}


@dataclass(frozen=True)
class Label:
    """Text beside a point; `anchor` is the end of the text that stands at x."""

    x: float
    y: float
    anchor: str  # start | middle | end
    text: str


@dataclass(frozen=True)
class Point:
    """A candidate in pixels, y downwards; `index` is its row in the table."""

    index: int
    name: str
    x: float
    y: float
    low: float | None  # pixels of the ends of the interval
    high: float | None
    front: bool
    made: bool
    tip: str
    label: Label | None


@dataclass(frozen=True)
class Chart:
    """Everything to draw; ticks are (pixel, text)."""

    cost: str
    x_title: str
    y_title: str
    points: list[Point]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    stairs: list[tuple[float, float]]  # corners of the front


@dataclass(frozen=True)
class _Scale:
    """A value's pixel; `log` axes take logarithms first, `down` axes turn the direction."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        def f(v: float) -> float:
            return math.log(v) if self.log else v

        share = (f(value) - f(self.low)) / (f(self.high) - f(self.low))
        return self.start + share * (self.end - self.start)


def chart(found: dict[str, Any], cost: str) -> Chart | None:
    """Lay out one chart of a comparison, or None with fewer than two points."""
    lower = found["lower_is_better"]
    shown = [
        (i, c, price)
        for i, c in enumerate(found["candidates"])
        if c["quality"] and (price := _unit(c, cost)) is not None
    ]
    if len(shown) < 2:
        return None
    across = _axis([price for *_, price in shown], LEFT, WIDTH - RIGHT, log=True, pad=0.12)
    ends = [_ends(c["quality"]) for _, c, _ in shown]
    heights = [v for triple in ends for v in triple]
    wide = lower and min(heights) > 0 and max(heights) / min(heights) > 4
    edges = (TOP, HEIGHT - BOTTOM) if lower else (HEIGHT - BOTTOM, TOP)
    up = _axis(heights, *edges, log=wide, pad=0.08)
    places = [(across(price), up(c["quality"]["value"])) for _, c, price in shown]
    labels = _labels([(p, c) for p, (_, c, _) in zip(places, shown, strict=True)], cost)
    points = [
        Point(
            index=i,
            name=c["name"],
            x=x,
            y=y,
            low=up(low) if low != high else None,
            high=up(high) if low != high else None,
            front=cost in c["front"],
            made=c["made"],
            tip=f"{c['name']}: {significant(price)} {'MB' if cost == 'bytes' else 'ms'}, "
            f"{found['quality']} {interval(c['quality'])}",
            label=label,
        )
        for (i, c, price), (x, y), (low, _, high), label in zip(
            shown, places, ends, labels, strict=True
        )
    ]
    better = "lower is better" if lower else "higher is better"
    return Chart(
        cost=cost,
        x_title=_title(found, cost),
        y_title=f"{found['quality']} ({better})",
        points=points,
        x_ticks=[(across(v), f"{v:g}") for v in _ticks(across)],
        y_ticks=[(up(v), f"{v:g}") for v in _ticks(up)],
        stairs=stairs([(p.x, p.y) for p in points if p.front]),
    )


def _title(found: dict[str, Any], cost: str) -> str:
    if cost == "bytes":
        return "MB on disk"
    return f"milliseconds per {PER.get(found['runs'][0]['task'], 'row')}, median"


def _unit(candidate: dict[str, Any], cost: str) -> float | None:
    value = cost_of(candidate, cost)
    return value / 1e6 if value is not None and cost == "bytes" else value


def _ends(quality: dict[str, Any]) -> tuple[float, float, float]:
    value = quality["value"]
    low, high = (quality.get(end) for end in ("low", "high"))
    return (value if low is None else low), value, (value if high is None else high)


def _axis(values: Sequence[float], start: float, end: float, *, log: bool, pad: float) -> _Scale:
    """A scale over all values with some air at both ends."""
    low, high = min(values), max(values)
    if log:
        air = max((high / low) ** pad, 1.05)
        return _Scale(low / air, high * air, start, end, log)
    air = max((high - low) * pad, abs(high) * 0.002, 1e-6)
    return _Scale(low - air, high + air, start, end, log)


def _ticks(scale: _Scale) -> list[float]:
    """Round numbers inside a scale: 1, 2, 5 where it spans enough, else even steps."""
    if scale.log and scale.high / scale.low > 3:
        first = math.floor(math.log10(scale.low))
        decades = range(first, first + 12)
        found = [m * 10.0**e for e in decades for m in (1, 2, 5)]
        inside = [v for v in found if scale.low <= v <= scale.high]
        return [float(f"{v:.6g}") for v in inside]
    span = scale.high - scale.low
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= 5)
    start = math.ceil(scale.low / step)
    count = math.floor(scale.high / step) - start + 1
    return [float(f"{(start + i) * step:.10g}") for i in range(count)]


Box = tuple[float, float, float, float]


def stairs(front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of a front given in pixels: the best quality that can be had at each cost."""
    corners: list[tuple[float, float]] = []
    for x, y in sorted(front, key=lambda place: (place[0], -place[1])):
        if corners:
            corners.append((x, corners[-1][1]))
        corners.append((x, y))
    return corners


def _labels(
    given: list[tuple[tuple[float, float], dict[str, Any]]], cost: str
) -> list[Label | None]:
    """A place beside every point, those on the front first; None where all are taken.

    A label covers no dot and no other label; it crosses the line of the front only where there
    is no other place.
    """
    taken = [_around(x, y, RADIUS + 1) for (x, y), _ in given]
    corners = stairs([place for place, c in given if cost in c["front"]])
    line = [_segment(*pair) for pair in pairwise(corners)]
    found: list[Label | None] = [None] * len(given)
    for i in sorted(range(len(given)), key=lambda i: cost not in given[i][1]["front"]):
        (x, y), candidate = given[i]
        others = taken[:i] + taken[i + 1 :]
        free = [
            label
            for label in _places(x, y, candidate["name"], left=cost in candidate["front"])
            if _inside(_box(label)) and not _hits(_box(label), others)
        ]
        found[i] = min(free, key=lambda label: _hits(_box(label), line), default=None)
        if label := found[i]:
            taken.append(_box(label))
    return found


def _places(x: float, y: float, text: str, left: bool) -> list[Label]:
    """Beside, above and below a point, then further off; the empty side of a front is the left."""
    gap = RADIUS + 5
    sides = (-1, 1) if left else (1, -1)
    beside = [
        Label(x + side * gap, y + 4 + rise, "start" if side > 0 else "end", text)
        for rise in (0, -12, 14, -24, 26)
        for side in sides
    ]
    upright = [
        Label(x, y - gap, "middle", text),
        Label(x, y + gap + 10, "middle", text),
    ]
    return beside[:2] + upright + beside[2:]


def _around(x: float, y: float, reach: float) -> Box:
    return x - reach, y - reach, x + reach, y + reach


def _segment(a: tuple[float, float], b: tuple[float, float]) -> Box:
    (ax, ay), (bx, by) = a, b
    return min(ax, bx) - 1, min(ay, by) - 1, max(ax, bx) + 1, max(ay, by) + 1


def _box(label: Label) -> Box:
    width = LETTER * len(label.text)
    left = label.x - {"start": 0.0, "middle": width / 2, "end": width}[label.anchor]
    return left, label.y - LINE + 3, left + width, label.y + 4


def _inside(box: Box) -> bool:
    left, top, right, bottom = box
    return left >= LEFT + 2 and right <= WIDTH - 2 and top >= TOP and bottom <= HEIGHT - BOTTOM


def _hits(a: Box, others: Sequence[Box]) -> int:
    """How many boxes a box overlaps."""
    return sum(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in others)
