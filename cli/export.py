"""`compress export`: write a finished checkpoint in the form another engine serves."""

from typing import Annotated, Any

import typer

from .flags import Out


def export(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Directory or model.")],
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="onnx, genai, gguf, safetensors, ...")
    ],
    out: Out,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=V", help="Option of the exporter, e.g. opset=20."),
    ] = None,
) -> None:
    """Export a checkpoint and prove it.

    The file is loaded back in its engine and compared before it gets its name.
    """
    import compressor

    from .quiet import quiet
    from .render import show_lines

    with quiet():
        artifact = compressor.export_checkpoint(checkpoint, to=to, out=out, set=tuple(set_ or ()))
    show_lines(str(artifact.path))
    if remark := _unproven(artifact.manifest.engine, artifact.manifest.metrics):
        typer.echo(remark, err=True)


def _unproven(engine: str | None, metrics: dict[str, Any]) -> str:
    """What has not run the artefact, for want of a library; "" where all have."""
    if why := metrics.get("genai", {}).get("not_run"):
        return f"proven in ONNX Runtime; onnxruntime-genai has not run it. {why}"
    if engine == "gguf":
        from compressor.engines import install_line

        install = install_line("llama.cpp")
        return f"read back into PyTorch and compared; llama.cpp has not run it. {install}"
    return ""
