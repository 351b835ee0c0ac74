"""`compress methods`: what a profile may name, with papers and options."""

from typing import Any

from .flags import Json, MethodName


def methods(name: MethodName = None, json: Json = False) -> None:
    """List the methods, or the options of one."""
    import compressor

    from .render import show_json, show_table, show_text

    found = compressor.list_methods(name)
    if json:
        show_json(found)
    elif name is None:
        show_table(method_table(found))
    else:
        show_text(f"{found[0]['summary']}\n")
        show_table(option_table(found[0]))


def method_table(found: list[dict[str, Any]]) -> Any:
    """One row per method."""
    from compressor.run.tables import Table

    rows = [(m["name"], f"arXiv {m['paper']}" if m["paper"] else "", m["summary"]) for m in found]
    return Table("Methods", ("name", "paper", "what it does"), rows, prose=True)


def option_table(method: dict[str, Any]) -> Any:
    """One row per option of a method."""
    from compressor.run.tables import Table, facts

    rows = [
        (key, str(option["type"]), facts(option["default"]), str(option.get("description") or ""))
        for key, option in method["options"].items()
    ]
    return Table(method["name"], ("option", "type", "default", "meaning"), rows, prose=True)
