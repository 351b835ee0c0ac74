"""Write what a run found: report.json (all of it), report.md (tables), report.html (and charts).

None of the three names an absolute path: they are made to be passed on.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from compressor.run.outputs import replace_files
from compressor.run.page import html, title, usage_code
from compressor.run.report_tables import report_tables
from compressor.run.tables import Table
from compressor.run.verdict import report_sentences

# an absolute path of two parts or more, not the tail of a URL or of a relative path
ABSOLUTE = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\"/\\:]+[/\\])+([^\s'\"/\\:]*)")


def write_report(directory: Path, report: dict[str, Any]) -> None:
    """Write report.json, report.md and report.html into an existing directory.

    Args:
        directory: the output directory of the run.
        report: name, description, profile (text), model, machine, packages, seed, seconds,
            stages, bench (the `bench --json` form or None), gates, artifacts, domain.
            `title` takes the place of name and model where there is one.
    """
    shown = presentable(report)
    texts = {
        "report.json": json.dumps(shown, indent=1, allow_nan=False) + "\n",
        "report.md": markdown(shown),
        "report.html": html(shown),
    }
    replace_files(directory, texts)


def presentable(value: Any) -> Any:
    """A copy without absolute paths (the last part stays) and without NaN or infinity (null)."""
    if isinstance(value, dict):
        return {presentable(str(key)): presentable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [presentable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return ABSOLUTE.sub(r"\1", value) if isinstance(value, str) else value


def markdown(report: dict[str, Any], numbers: str = "report.json") -> str:
    """report.md: verdict, tables, usage and the resolved profile; `numbers` names the JSON."""
    lines = report_sentences(report)
    blocks = [
        f"# {_plain(title(report))}",
        _plain(report.get("description") or ""),
        "\n".join(f"- {_plain(line)}" for line in lines),
        *(_table(table) for table in report_tables(report)),
        *(
            f"## Use {_plain(a['name'])} ({_plain(a['engine'])})\n\n"
            + _code(usage_code(a, a["name"]), "python")
            for a in report.get("artifacts") or []
        ),
        "## Resolved profile\n\n" + _code(report["profile"], "yaml") if "profile" in report else "",
        f"Charts are in report.html; every number is in {numbers}.",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _table(table: Table) -> str:
    align = ["---", *(["---" if table.prose else "---:"] * (len(table.header) - 1))]
    rows = [table.header, align, *table.rows]
    body = "\n".join("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows)
    return f"## {_plain(table.title)}\n\n{body}"


def _plain(text: str) -> str:
    """One line in which neither HTML nor a table bar can start."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _code(text: str, language: str) -> str:
    """A fenced block whose fence is longer than any inside the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
