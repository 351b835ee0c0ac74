"""The Typer app and its one error boundary. Nothing heavy is imported before a command needs it."""

import os
import re
import shlex
import sys
import tempfile
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from compressor.errors import CompressError
from compressor.options import nearest

from . import bench, compare, export, inspect, methods, plan, profiles, run, verify

INTERRUPTED = 130
_STARTED = time.time()

app = typer.Typer(
    name="compress",
    help="Prune, distill, quantize and export Hugging Face checkpoints in one verified run.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("plan")(plan.plan)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("inspect")(inspect.inspect)
app.command("methods")(methods.methods)
app.command("profiles")(profiles.profiles)
app.command("export")(export.export)
app.command("verify")(verify.verify)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"compress {metadata.version('compress')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script; of several processes (torchrun), the first one speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK") != "0":
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    sys.exit(call(sys.argv[1:]))


def call(argv: list[str]) -> int:
    """Run one command line and return its exit code; every error becomes two lines on stderr."""
    try:
        code = app(argv or ["--help"], prog_name="compress", standalone_mode=False)
    except CompressError as error:
        return _fail(error.what, error.hint, error.exit_code)
    except typer.TyperException as error:
        return _fail(*_usage(error.format_message(), argv), error.exit_code)
    except KeyboardInterrupt:
        return _interrupted(argv)
    except Exception as error:  # the boundary: whatever else escapes is our bug, said in one line
        return _broken(error, argv)
    if code == INTERRUPTED:  # Typer turns KeyboardInterrupt into this code
        return _interrupted(argv)
    return code if isinstance(code, int) else 0


def _fail(what: str, hint: str, code: int) -> int:
    typer.echo(f"error: {' '.join(what.split())}", err=True)
    if hint:
        typer.echo(f"hint: {' '.join(hint.split())}", err=True)
    return code


def _usage(message: str, argv: list[str]) -> tuple[str, str]:
    """Typer's own message in our form: what is wrong, the nearest name, where to look."""
    what = message[:1].lower() + message[1:].rstrip(".")
    unknown = re.fullmatch(r"no such option: (\S+) \(Possible options?: (.+)\)", what)
    if unknown:
        flag, listed = unknown.groups()
        what = f"no such option: {flag}{nearest(flag, listed.split(', '))}"
    known = {command.name for command in app.registered_commands}
    command = f"compress {argv[0]}" if argv and argv[0] in known else "compress"
    return what, f"{command} --help"


def _interrupted(argv: list[str]) -> int:
    if argv[:1] != ["run"]:
        typer.echo("interrupted", err=True)
        return INTERRUPTED
    typer.echo("interrupted; finished stages are kept", err=True)
    same = argv if _still_to_redo(argv) else _without_redo(argv)
    typer.echo(f"hint: {shlex.join(['compress', *same])}", err=True)
    return INTERRUPTED


def _still_to_redo(argv: list[str]) -> bool:
    """Whether the stage that --redo names is still the one from before this process."""
    number = _value_of(argv, "--redo")
    found = Path(_value_of(argv, "--out")).glob(f"{number:0>2}-*") if number else ()
    return any(directory.stat().st_mtime < _STARTED for directory in found)


def _without_redo(argv: list[str]) -> list[str]:
    """The same command without --redo, which would throw away what was finished since."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != "--redo" and not word.startswith("--redo="):
            kept.append(word)
        skip = word == "--redo"
    return kept


def _broken(error: Exception, argv: list[str]) -> int:
    from compressor.run.shortage import shortage

    lacking = shortage(error)
    if lacking is not None:
        return _fail(lacking.what, lacking.hint, lacking.exit_code)
    log = _log_file(argv)
    with log.open("a", encoding="utf-8") as stream:
        traceback.print_exception(error, file=stream)
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return _fail(f"compress crashed ({reason})", f"the traceback is in {log}", 1)


def _log_file(argv: list[str]) -> Path:
    """OUT/log.txt of a run that has begun, else a new file in the temporary directory."""
    out = _value_of(argv, "--out")
    if out and (Path(out) / "log.txt").is_file():
        return Path(out) / "log.txt"
    with tempfile.NamedTemporaryFile(prefix="compress-", suffix=".log", delete=False) as file:
        return Path(file.name)


def _value_of(argv: list[str], flag: str) -> str:
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        if word == flag:
            return after
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return ""


if __name__ == "__main__":
    main()
