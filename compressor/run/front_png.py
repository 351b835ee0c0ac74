"""front.png of a comparison: the charts of the page for slides and chats, drawn by matplotlib."""

import io
from typing import Any

from compressor.run.scatter import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RADIUS,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    chart,
)

INK, SOFT, LINE, OURS, OTHER = "#1d1d1f", "#6a6a70", "#e3e3e6", "#2563c9", "#a9b0bb"
HEAD = 48  # pixels above the charts for the sentence
POINTS = 0.72  # of a typographic point per pixel, at 100 dots per inch


def png(found: dict[str, Any]) -> bytes:
    """The charts side by side under the sentence that says what to pick."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    charts = [c for cost in ("bytes", "latency") if (c := chart(found, cost))]
    width, height = WIDTH * max(len(charts), 1), HEIGHT + HEAD
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(
        14 / width,
        1 - 18 / height,
        _wrapped(found["pick"], width),
        size=12 * POINTS,
        color=INK,
        va="top",
        parse_math=False,
    )
    for i, drawn in enumerate(charts):
        _draw(figure, drawn, i * WIDTH, width, height, found["picked"])
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=200, metadata={"Software": None})
    return stream.getvalue()


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width // 7, max_lines=3, placeholder=" ..."))


def _draw(
    figure: Any, drawn: Chart, left: int, width: int, height: int, picked: str | None
) -> None:
    """One chart whose coordinates are the pixels of the layout, y downwards."""
    box = (left / width, 0, WIDTH / width, HEIGHT / height)
    axes = figure.add_axes(box)
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(HEIGHT, 0)
    axes.axis("off")
    size = 12 * POINTS
    for x, text in drawn.x_ticks:
        axes.plot([x, x], [TOP, HEIGHT - BOTTOM], color=LINE, lw=0.8, zorder=0)
        axes.text(x, HEIGHT - BOTTOM + 18, text, ha="center", size=size, color=SOFT)
    for y, text in drawn.y_ticks:
        axes.plot([LEFT, WIDTH - RIGHT], [y, y], color=LINE, lw=0.8, zorder=0)
        axes.text(LEFT - 8, y + 4, text, ha="right", size=size, color=SOFT)
    if drawn.stairs:
        xs, ys = zip(*drawn.stairs, strict=True)
        axes.plot(xs, ys, color=OURS, lw=1.4, ls=(0, (4, 3)), alpha=0.5, zorder=1)
    for point in drawn.points:
        if point.low is not None:
            axes.plot([point.x] * 2, [point.low, point.high], color=SOFT, lw=0.9, alpha=0.5)
        axes.plot(
            [point.x],
            [point.y],
            "o",
            ms=2 * RADIUS * POINTS,
            mfc=OURS if point.front or point.name == picked else "white",
            mec=INK if point.name == picked else OURS if point.front else OTHER,
            mew=1.6 if point.name == picked else 1.2,
            zorder=3,
        )
        if point.label:
            side = {"start": "left", "middle": "center", "end": "right"}[point.label.anchor]
            color = INK if point.front else SOFT
            axes.text(
                point.label.x,
                point.label.y,
                point.label.text,
                ha=side,
                size=size,
                color=color,
                parse_math=False,
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    axes.text(middle, HEIGHT - 10, drawn.x_title, ha="center", size=size, color=SOFT)
    axes.text(
        14,
        (TOP + HEIGHT - BOTTOM) / 2,
        drawn.y_title,
        rotation=90,
        ha="center",
        va="center",
        size=size,
        color=SOFT,
        parse_math=False,
    )
