"""`compress run`: call the core, then show the honest table and how to use what was made."""

from pathlib import Path
from typing import Any

from .flags import Data, Model, Out, ProfileName, Quiet, Redo, Set, Teacher


def run(
    profile: ProfileName,
    out: Out,
    model: Model = None,
    teacher: Teacher = None,
    data: Data = None,
    set_: Set = None,
    redo: Redo = None,
    quiet: Quiet = False,
) -> None:
    """Run a profile. The same command again continues where it stopped."""
    import compressor
    from compressor.screen import Silent

    from .screen import RichScreen

    result = compressor.run(
        profile,
        model=model,
        out=out,
        teacher=teacher,
        data=data,
        set=tuple(set_ or ()),
        redo=redo,
        screen=Silent() if quiet else RichScreen(),
    )
    show_report(result.metrics, result.path)


def show_report(report: dict[str, Any], out: Path) -> None:
    """The comparison, what it allows to be said, the paths, and three lines that use the result."""
    from compressor.run.bench_tables import bench_tables
    from compressor.run.page import usage_code
    from compressor.run.report_tables import stages
    from compressor.run.verdict import report_sentences

    from .render import show_lines, show_table, show_text

    bench = report.get("bench")
    for table in bench_tables(bench) if bench else [stages(report)]:
        show_table(table)
    for line in report_sentences(report):
        show_text(line)
    show_lines("", f"report    {out / 'report.html'} (also .md and .json)")
    artifacts = report.get("artifacts") or []
    for artifact in artifacts:
        show_lines(f"artefact  {out / artifact['name']}")
    if artifacts:
        show_lines("", usage_code(artifacts[0], str(out / artifacts[0]["name"])))
    elif report["stages"]:
        show_lines(f"model     {out / report['stages'][-1]['name']}")
