"""Flags that several commands share, and what shell completion offers for them."""

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer


def _profiles(incomplete: str) -> list[str]:
    names = (file.name for file in resources.files("compressor.profiles").iterdir())
    found = sorted(name[:-5] for name in names if name.endswith(".yaml"))
    return [name for name in found if name.startswith(incomplete)]


def _methods(incomplete: str) -> list[str]:
    from compressor.run.methods import all_methods

    return [name for name in all_methods() if name.startswith(incomplete)]


ProfileName = Annotated[
    str,
    typer.Argument(
        metavar="PROFILE", help="A shipped profile or a YAML file.", autocompletion=_profiles
    ),
]
MethodName = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="One method, e.g. distill.kd.", autocompletion=_methods),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="Directory, hub id or package:NAME[/subdir]."),
]
Teacher = Annotated[
    str | None,
    typer.Option("--teacher", metavar="T", help="input, stage:N, directory, hub id or package."),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="F", help=".txt, .jsonl, .csv, folder of images or stdlib:MODULE."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=V", help="Change the profile: stages.N.KEY=VALUE."),
]
Redo = Annotated[
    int | None,
    typer.Option("--redo", metavar="N", help="Make stage N and all after it again."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Out = Annotated[Path, typer.Option("--out", metavar="D", help="Output directory.")]
OptionalOut = Annotated[Path | None, typer.Option("--out", metavar="D", help="Output directory.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
