"""Draw a quality-against-cost chart (scatter.py) as inline SVG; colours come from the page."""

from html import escape

from compressor.run.scatter import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RADIUS,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Point,
)

STYLE = """
.stairs{fill:none;stroke:var(--ours);stroke-width:2;opacity:.45;stroke-dasharray:5 4}
.dot{stroke:var(--card);stroke-width:2}.dot.ring{fill:var(--card);stroke:var(--other);stroke-width:2}
.dot.picked{fill:var(--ours);stroke:var(--ink);stroke-width:2.5}
.point{cursor:default}.point text{pointer-events:none}
.name{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.off text.name{fill:var(--soft)}.interval{stroke:var(--soft);stroke-width:1.2;opacity:.5}
"""


def svg(drawn: Chart, heading: str, picked: str | None) -> str:
    """A chart as inline SVG; the candidate named `picked` stands out."""
    stairs = "L".join(f"{x:.1f} {y:.1f}" for x, y in drawn.stairs)
    # a dot that is pointed at is drawn over its neighbours only if it comes later
    points = sorted(drawn.points, key=lambda p: (p.front, p.name == picked))
    body = [
        *(_rule(x, text, across=False) for x, text in drawn.x_ticks),
        *(_rule(y, text, across=True) for y, text in drawn.y_ticks),
        f'<path d="M{stairs}" class="stairs"/>' if stairs else "",
        *(_whisker(p) for p in points),
        *(_point(p, picked) for p in points),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" class="middle soft">'
        f"{escape(drawn.x_title)}</text>",
        f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" '
        f'class="middle soft">{escape(drawn.y_title)}</text>',
    ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(heading)}">'
        f"{''.join(body)}</svg>"
    )


def _rule(at: float, text: str, across: bool) -> str:
    if across:
        line = f"M{LEFT} {at:.1f}H{WIDTH - RIGHT}"
        place = f'x="{LEFT - 8}" y="{at + 4:.1f}" class="end soft"'
    else:
        line = f"M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"
        place = f'x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" class="middle soft"'
    return f'<path d="{line}" class="grid"/><text {place}>{escape(text)}</text>'


def _whisker(point: Point) -> str:
    if point.low is None or point.high is None:
        return ""
    return f'<path d="M{point.x:.1f} {point.low:.1f}V{point.high:.1f}" class="interval"/>'


def _point(point: Point, picked: str | None) -> str:
    style = "picked" if point.name == picked else ("ours" if point.front else "ring")
    label = ""
    if point.label:
        at = point.label
        label = (
            f'<text x="{at.x:.1f}" y="{at.y:.1f}" class="name {at.anchor}">{escape(at.text)}</text>'
        )
    return (
        f'<g class="point p{point.index}{"" if point.front else " off"}">'
        f"<title>{escape(point.tip)}</title>"
        f'<circle cx="{point.x:.1f}" cy="{point.y:.1f}" r="{RADIUS}" class="dot {style}"/>'
        f"{label}</g>"
    )
