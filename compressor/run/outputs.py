"""Output directories of `bench` and `compare`: a few files, and never among somebody else's."""

from collections.abc import Collection, Mapping
from pathlib import Path

from compressor.errors import CompressError
from compressor.run.shortage import shortages


def claim(out: Path, names: Collection[str]) -> None:
    """Make sure that `out` can be written to, before minutes are spent on what goes there.

    Args:
        out: directory; created when it does not exist.
        names: every file that the command writes; an earlier result of it is replaced.

    Raises:
        CompressError: it is a file, holds anything else, or cannot be created.
    """
    if out.exists() and not out.is_dir():
        raise CompressError(f"'{out}' is a file", "give a directory with --out")
    ours = {*names, *(f".{name}.tmp" for name in names)}  # a killed one leaves these
    strangers = sorted(p.name for p in out.iterdir() if p.name not in ours) if out.exists() else []
    if strangers:
        raise CompressError(
            f"'{out}' holds other files ({', '.join(strangers[:3])})",
            "give a new or empty --out directory",
        )
    with shortages(out.name):
        out.mkdir(parents=True, exist_ok=True)


def write_files(out: Path, files: Mapping[str, str | bytes]) -> None:
    """`replace_files` in a directory that the command itself made."""
    with shortages(out.name):
        replace_files(out, files)


def replace_files(directory: Path, files: Mapping[str, str | bytes]) -> None:
    """Write every file under another name first, so that none is ever seen half-written."""
    for name, content in files.items():
        temporary = directory / f".{name}.tmp"
        data = content.encode("utf-8") if isinstance(content, str) else content
        temporary.write_bytes(data)
        temporary.rename(directory / name)
