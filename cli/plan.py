"""`compress plan`: what every stage will need, and whether this machine has it."""

from typing import Any

from .flags import Data, Json, Model, OptionalOut, ProfileName, Quiet, Redo, Set, Teacher


def plan(
    profile: ProfileName,
    model: Model = None,
    teacher: Teacher = None,
    data: Data = None,
    set_: Set = None,
    out: OptionalOut = None,
    redo: Redo = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Show what a run would need.

    Parameters, memory, disk and time of every stage. Takes the flags of run, so that a command
    line can be tried first; --redo changes nothing here.
    """
    import compressor
    from compressor.run.preflight import refuse_if_too_big

    from .render import show_json, show_table, show_text

    found = compressor.plan(
        profile, model=model, teacher=teacher, data=data, set=tuple(set_ or ()), out=out
    )
    if json:
        show_json(found)
    elif not quiet:
        show_table(table(found))
        for remark in found["remarks"]:
            show_text(f"note: {remark}")
    refuse_if_too_big(found)


def table(found: dict[str, Any]) -> Any:
    """The stages of a plan as a Table, with the sum of disk and time."""
    from compressor.run.tables import Table, clock, megabytes, millions

    rows = [
        (
            _named(stage),
            millions(stage["parameters_out"]),
            megabytes(stage["bytes_out"]),
            megabytes(stage["peak_memory_bytes"]),
            megabytes(stage["disk_bytes"]),
            clock(stage["seconds"]),
        )
        for stage in found["stages"]
    ]
    disk, seconds = (sum(s[k] or 0 for s in found["stages"]) for k in ("disk_bytes", "seconds"))
    total = ("total", "", "", "", megabytes(disk), clock(seconds))
    title = "Plan: it fits" if found["fits"] else "Plan: it does NOT fit"
    return Table(title, ("stage", "params", "MB", "peak MB", "disk MB", "time"), [*rows, total])


def _named(stage: dict[str, Any]) -> str:
    count = stage.get("candidates")
    return f"{stage['name']} ({count} candidates)" if count else str(stage["name"])
