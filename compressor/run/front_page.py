"""report.html of a comparison: what to pick, two charts, the plain truth. Nothing is loaded.

Without a script: pointing at a dot or a row lights up the same candidate everywhere, by CSS alone.
"""

from html import escape
from typing import Any

from compressor.run.front_svg import svg
from compressor.run.front_table import front_table, in_order
from compressor.run.page import document
from compressor.run.scatter import Chart, chart
from compressor.run.tables import threads

STYLE = """
main{max-width:76rem}.pick{font-size:1.35rem;line-height:1.4;margin:1rem 0 1.6rem;
padding:1.1rem 1.4rem;background:var(--card);border:1px solid var(--line);
border-left:5px solid var(--ours);border-radius:8px}
.figures{grid-template-columns:repeat(auto-fill,minmax(min(30rem,100%),1fr))}
tr.row:hover td{background:color-mix(in srgb,var(--ours) 12%,transparent)}
tr.picked td{font-weight:600}td .chip{display:inline-block;padding:0 .5rem;border-radius:1rem;
background:color-mix(in srgb,var(--ours) 18%,transparent);font-size:.85em;margin-left:.25rem}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;font-size:.85rem;color:var(--soft);margin:.8rem 0}
.key svg{display:inline;width:1.1rem;height:.9rem;vertical-align:-.1rem;margin-right:.35rem}
ul{padding-left:1.2rem;margin:.4rem 0}li{margin:.3rem 0}
"""
HEADINGS = {"bytes": "Quality against size", "latency": "Quality against speed"}


def page(found: dict[str, Any]) -> str:
    """The whole page of a comparison; every value from outside is escaped."""
    names = ", ".join(run["name"] for run in found["runs"])
    charts = [c for cost in HEADINGS if (c := chart(found, cost))]
    parts = [
        f"<h1>What to pick</h1><p class='soft'>{escape(_subtitle(found, names))}</p>",
        f'<p class="pick">{escape(found["pick"])}</p>',
        f'<div class="figures">{"".join(_figure(c, found) for c in charts)}</div>',
        _key() if charts else "",
        _table(found),
        _sentences("The plain truth", found["truths"]),
        _sentences("How far this can be compared", [*found["notes"], *_circumstances(found)]),
    ]
    return document(f"compare: {names}", "".join(parts), STYLE + _links(len(found["candidates"])))


def _subtitle(found: dict[str, Any], names: str) -> str:
    count = len(found["candidates"])
    return f"{count} candidates from {names}, by {found['quality']} on the same held-out data"


def _links(count: int) -> str:
    """A rule per candidate: pointing at it anywhere enlarges its dots and tints its row."""
    return "".join(
        f"body:has(.p{i}:hover) .p{i} .dot{{r:9px}}"
        f"body:has(.p{i}:hover) tr.p{i} td{{"
        "background:color-mix(in srgb,var(--ours) 12%,transparent)}"
        for i in range(count)
    )


def _figure(drawn: Chart, found: dict[str, Any]) -> str:
    heading = HEADINGS[drawn.cost]
    return (
        f"<figure><h3>{heading}</h3>{svg(drawn, heading, found['picked'])}"
        "<figcaption>Up and left is better. Point at a dot for its numbers.</figcaption></figure>"
    )


def _key() -> str:
    dots = (("picked", "the pick"), ("ours", "on the front"), ("ring", "another is better"))
    shown = [
        f'<span><svg viewBox="0 0 18 14"><circle cx="9" cy="7" r="5.5" class="dot {style}"/></svg>'
        f"{text}</span>"
        for style, text in dots
    ]
    line = '<svg viewBox="0 0 18 14"><path d="M0 7H18" class="stairs"/></svg>'
    whisker = '<svg viewBox="0 0 18 14"><path d="M9 0V14" class="interval"/></svg>'
    shown.append(f"<span>{line}the best quality at each cost</span>")
    shown.append(f"<span>{whisker}95 % interval over documents</span>")
    return f'<div class="key">{"".join(shown)}</div>'


def _table(found: dict[str, Any]) -> str:
    table = front_table(found)
    place = {id(c): i for i, c in enumerate(found["candidates"])}
    numbers = [place[id(c)] for c in in_order(found)]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = []
    for row, index in zip(table.rows, numbers, strict=True):
        candidate = found["candidates"][index]
        picked = " picked" if candidate["name"] == found["picked"] else ""
        chips = "".join(f'<span class="chip">{escape(t)}</span>' for t in row[-1].split(", "))
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[:-1])
        front = chips if candidate["front"] else ""
        rows.append(f'<tr class="row p{index}{picked}">{cells}<td>{front}</td></tr>')
    return (
        f'<h2>{escape(table.title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _sentences(heading: str, lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>{heading}</h2><ul>{items}</ul>"


def _circumstances(found: dict[str, Any]) -> list[str]:
    """What the runs were measured with; those that share it share a line."""
    shared: dict[str, list[str]] = {}
    for run in found["runs"]:
        text = (
            f"{run['task']}, {run['rounds']} rounds on {threads(run['threads'])} of "
            f"{run['machine']['cpu']}, quality on held-out text of {run['data']['name']}."
        )
        shared.setdefault(text, []).append(run["name"])
    return [f"{', '.join(names)}: {text}" for text, names in shared.items()]
