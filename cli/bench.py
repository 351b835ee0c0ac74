"""`compress bench`: any models side by side, each against the first."""

from typing import Annotated, Any

import typer

from .flags import Data, Json, OptionalOut


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A [B ...]",
            help="Directories, hub ids, package:NAME[/subdir], or ENGINE:DIR: onnxruntime, genai, "
            "openvino, gguf, llama.cpp.",
        ),
    ],
    data: Data = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            "--measure", metavar="NAME", help="Only these (size, latency, memory, fidelity, ...)."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME.KEY=V", help="Option of a measure, e.g. wer.rows=64."),
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", help="Threads of speed and memory.")
    ] = 1,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="Turns per candidate.")] = 7,
    device: Annotated[
        str,
        typer.Option("--device", metavar="D", help="cpu, or an ONNX Runtime provider, e.g. cuda."),
    ] = "cpu",
    out: OptionalOut = None,
    json: Json = False,
) -> None:
    """Measure models side by side.

    Size, speed, memory and quality of checkpoints and exported models, each against the first.
    By default: size, latency, memory, fidelity to the first, and what fits the task.
    """
    import compressor
    from compressor.screen import Silent

    from .quiet import quiet
    from .render import show_json
    from .screen import RichScreen

    screen = Silent() if json else RichScreen()
    with quiet():
        found = compressor.bench(
            models,
            data=data,
            measures=tuple(measure or ()),
            set=tuple(set_ or ()),
            threads=threads,
            rounds=rounds,
            device=device,
            out=out,
            screen=screen,
        )
    if json:
        show_json(found)
    else:
        show_bench(found, out)


def show_bench(found: dict[str, Any], out: Any) -> None:
    """The tables, what they allow to be said, and where the report is."""
    from compressor.run.bench_tables import bench_tables
    from compressor.run.verdict import verdict

    from .render import show_lines, show_table, show_text

    for table in bench_tables(found):
        show_table(table)
    for line in verdict(found, found["domain"]):
        show_text(line)
    if out:
        show_lines("", f"report    {out / 'report.html'} (also report.md and bench.json)")
