"""report.html: one self-contained file, pleasant in light and dark. No script, nothing loaded."""

from html import escape
from typing import Any

from compressor.run.figures import figures
from compressor.run.front_svg import STYLE as CHART_STYLE
from compressor.run.plots import STYLE as PLOT_STYLE
from compressor.run.report_tables import report_tables
from compressor.run.tables import Table
from compressor.run.verdict import report_sentences

STYLE = """
:root{color-scheme:light dark;--page:#fcfcfb;--card:#fff;--ink:#1d1d1f;--soft:#6a6a70;
--line:#e3e3e6;--ours:#2563c9;--other:#a9b0bb;--gone:#d5d9e0}
@media(prefers-color-scheme:dark){:root{--page:#141518;--card:#1c1e22;--ink:#e8e8ea;--soft:#9b9ca3;
--line:#33353b;--ours:#6ea2f5;--other:#5f6671;--gone:#3a3e46}}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.7rem;margin:0 0 .2rem}h2{font-size:1.15rem;margin:2.4rem 0 .7rem}
h3{font-size:.95rem;margin:0 0 .4rem}p{margin:.4rem 0}.soft,figcaption{color:var(--soft)}
.verdict{border-left:3px solid var(--ours);padding:.1rem 0 .1rem 1rem;margin:1.2rem 0}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:500}
th.text,td.text{text-align:left;white-space:normal}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(27rem,100%),1fr));gap:1rem}
figure{margin:0;padding:1rem;background:var(--card);border:1px solid var(--line);border-radius:8px}
figcaption{font-size:.85rem}svg{width:100%;height:auto;display:block}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;
overflow-x:auto;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}
"""


def html(report: dict[str, Any]) -> str:
    """The whole page of a report; every value from outside is escaped."""
    parts = [
        f"<h1>{escape(title(report))}</h1>",
        f'<p class="soft">{escape(report.get("description") or "")}</p>',
        _verdict(report),
        *(table_html(table) for table in report_tables(report)),
        _figures(report),
        *(_usage(artifact) for artifact in report.get("artifacts") or []),
    ]
    if "profile" in report:
        parts.append(f"<h2>Resolved profile</h2><pre>{escape(report['profile'])}</pre>")
    return document(title(report), "".join(parts))


def title(report: dict[str, Any]) -> str:
    """Its own title, or that of a run: the profile and the model."""
    return report.get("title") or f"{report['name']}: {report['model']['id']}"


def document(heading: str, body: str, style: str = "") -> str:
    """A whole page around a body of HTML; nothing in it is loaded from elsewhere."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{STYLE}{PLOT_STYLE}{CHART_STYLE}{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _verdict(report: dict[str, Any]) -> str:
    lines = report_sentences(report)
    if not lines:
        return ""
    return f'<div class="verdict">{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>'


def table_html(table: Table) -> str:
    """A heading and a table; every cell is escaped."""
    style = ' class="text"' if table.prose else ""
    head = "".join(f"<th{style}>{escape(cell)}</th>" for cell in table.header)
    rows = "".join(
        "<tr>" + "".join(f"<td{style}>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if any(table.header) else ""
    return (
        f'<h2>{escape(table.title)}</h2><div class="wide"><table>{top}'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _figures(report: dict[str, Any]) -> str:
    found = [
        f"<figure><h3>{escape(f.title)}</h3>{f.svg}<figcaption>{escape(f.caption)}</figcaption>"
        "</figure>"
        for f in figures(report)
    ]
    return f'<h2>Figures</h2><div class="figures">{"".join(found)}</div>' if found else ""


def _usage(artifact: dict[str, Any]) -> str:
    name = artifact["name"]
    return (
        f"<h2>Use {escape(name)} ({escape(artifact['engine'])})</h2>"
        f"<pre>{escape(usage_code(artifact, name))}</pre>"
    )


def usage_code(artifact: dict[str, Any], directory: str) -> str:
    """The artefact's three lines of Python, after the line that says where its folder is."""
    return f"DIR = {directory!r}\n{artifact['usage']}"
