"""`compress inspect`: what a checkpoint or artefact is, or which kernels this machine runs."""

from typing import Annotated, Any

import typer

from .flags import Json


def inspect(
    path: Annotated[str | None, typer.Argument(metavar="PATH", help="Directory or model.")] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Ops and what runs them.")] = False,
    importance: Annotated[
        bool, typer.Option("--importance", help="Scores that a pruning stage left.")
    ] = False,
    json: Json = False,
) -> None:
    """Describe a checkpoint or an artefact."""
    import compressor
    from compressor.errors import CompressError

    from .quiet import quiet
    from .render import show_json, show_table

    if (path is None) != kernels or (kernels and importance):
        raise CompressError("name one PATH, or --kernels", "compress inspect PATH")
    with quiet():
        found: Any = (
            compressor.list_kernels() if kernels else compressor.inspect(str(path), importance)
        )
    if json:
        show_json(found)
        return
    for table in tables(found, kernels, importance):
        show_table(table)


def tables(found: Any, kernels: bool, importance: bool) -> list[Any]:
    """What is shown of the one thing that was asked for."""
    if importance:
        from compressor.run.inspect_importance import importance_tables

        return importance_tables(found)
    return [kernel_table(found) if kernels else path_table(found)]


def kernel_table(found: list[dict[str, Any]]) -> Any:
    """One row per op."""
    from compressor.run.tables import Table

    header = ("op", "implementation", "reason")
    return Table("Kernels", header, [tuple(str(row[k]) for k in header) for row in found], True)


def path_table(found: dict[str, Any]) -> Any:
    """The facts of `inspect --json` that fit on a screen; formats and stages in short."""
    from compressor.model.manifest import WeightFormat
    from compressor.model.sparse import patterns_text
    from compressor.run.tables import Table, clock, facts, megabytes, millions

    formats = {name: WeightFormat(**f) for name, f in found["formats"].items()}
    kinds = "; ".join(sorted({facts(_chosen(f)) for f in found["formats"].values()} - {""}))
    stages = [f"{s['method']} ({clock(s['seconds'])})" for s in found["stages"]]
    rows = [
        ("kind", facts([x for x in (found["kind"], found["engine"]) if x])),
        ("family", str(found["family"])),
        ("parameters", millions(found["parameters"])),
        ("not zero", millions(found["nonzero_parameters"])),
        ("on disk", f"{megabytes(found['bytes'])} MB"),
        ("dtype", str(found["dtype"])),
        ("sizes", facts(found["sizes"])),
        ("sparsity", patterns_text(formats) or "none"),
        ("formats", f"{len(formats)} modules: {kinds}" if kinds else "float"),
        *_beyond_transformers(found, formats),
        ("stages", ", ".join(stages) or "none"),
        ("complete", "yes" if found["complete"] else "no manifest.json"),
    ]
    return Table(str(found["path"]), ("", ""), rows, prose=True)


def _beyond_transformers(found: dict[str, Any], formats: dict[str, Any]) -> list[tuple[str, str]]:
    """What plain transformers does not read."""
    rows, sides = [], sum(form.side_rank is not None for form in formats.values())
    if "packed" in found["metrics"]:
        rows.append(("stored", "without zeros; plain transformers cannot open it"))
    if sides:
        rows.append(("side paths", f"{sides} layers; plain transformers leaves them out"))
    return rows


def _chosen(weight_format: dict[str, Any]) -> dict[str, Any]:
    """How a module is stored, where it is quantized; its zeros have a row of their own."""
    elsewhere = ("scale_dtype", "pattern", "sparsity")
    known = weight_format if weight_format["bits"] is not None else {}
    return {k: v for k, v in known.items() if v is not None and k not in elsewhere}
