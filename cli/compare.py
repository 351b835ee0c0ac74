"""`compress compare`: what many runs made, on a Pareto front."""

from typing import Annotated, Any

import typer

from .flags import Json, OptionalOut


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Directories of run, or of bench --out."),
    ],
    out: OptionalOut = None,
    json: Json = False,
) -> None:
    """Put many runs on a Pareto front of quality, size and speed, and say what to pick."""
    import compressor

    from .render import show_json

    found = compressor.compare(runs, out=out)
    if json:
        show_json(found)
    else:
        show_front(found, out)


def show_front(found: dict[str, Any], out: Any) -> None:
    """The front, what to pick, the plain truths, and where the page is."""
    from compressor.run.front_table import front_table

    from .render import show_lines, show_table, show_text

    show_table(front_table(found))
    show_text(found["pick"])
    for line in [*found["truths"], *found["notes"]]:
        show_text(line)
    if out:
        show_lines("", f"report    {out / 'report.html'} (also front.png and report.json)")
