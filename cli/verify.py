"""`compress verify`: check a finished directory again, without its parent."""

from pathlib import Path
from typing import Annotated

import typer

from .flags import Json


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A directory that run wrote; openvino:DIR proves it in that engine.",
        ),
    ],
    json: Json = False,
) -> None:
    """Prove a finished directory again.

    Checks every digest and repeats the probe in the serving engine; exit 3 when one differs.
    """
    import compressor
    from compressor.errors import Refused
    from compressor.run.tables import Table

    from .quiet import quiet
    from .render import show_json, show_table

    with quiet():
        found = compressor.verify(path)
    if json:
        show_json(found)
    else:
        rows = [(c["name"], "ok" if c["ok"] else "FAILED", c["detail"]) for c in found["checks"]]
        show_table(Table(str(path), ("check", "result", "detail"), rows, prose=True))
    if not found["ok"]:
        failed = [c["name"] for c in found["checks"] if not c["ok"]]
        raise Refused(
            f"{path} failed {len(failed)} of {len(found['checks'])} checks: {', '.join(failed)}",
            "do not use it; copy it again or make it again with compress run",
        )
