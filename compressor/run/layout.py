"""The output directory: who may use it, what stands in it, how a stage lands in it at once."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.errors import CompressError, Refused
from compressor.model.manifest import NAME as MANIFEST

SOURCE = "00-source"
SCRATCH = ".scratch"
OURS = (SOURCE, ".lock")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of an output directory; the system frees it even after kill -9.

    Raises:
        CompressError: another run holds it, or the directory is not ours.
    """
    if out.exists() and not out.is_dir():
        raise CompressError(f"'{out}' is a file", "give a directory with --out")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in OURS):
        raise CompressError(
            f"'{out}' holds other files and no earlier run", "give a new or empty --out directory"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CompressError(
            f"cannot write to '{out}' ({error.strerror})", "give another --out directory"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CompressError(
                f"another run is working in '{out}'", "wait for it, or give another --out"
            ) from error
        yield
    finally:
        os.close(handle)


def stage_name(index: int, method: str) -> str:
    """Directory name of stage `index` (from 1), e.g. 02-distill.kd."""
    return f"{index:02d}-{method}"


def stage_directories(home: Path) -> list[Path]:
    """Complete stage directories in order, without the source."""
    found = [d for d in home.glob("[0-9][0-9]-*") if (d / MANIFEST).is_file() and d.name != SOURCE]
    return sorted(d for d in found if not d.name.endswith(".rejected"))


@contextmanager
def landing(target: Path, scratch: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends well.

    It stands beside its scratch, so a half-written directory never has the target's name.

    Raises:
        CompressError: the disk is full; what was finished before stays.
    """
    partial = scratch / f"{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with disk_errors(target):
        partial.mkdir(parents=True)
        yield partial
        assert (partial / MANIFEST).is_file(), "the manifest is written last, inside the block"
        partial.rename(target)


@contextmanager
def rejecting(built: Path, target: Path) -> Iterator[None]:
    """Keep what the block refuses under the name `target`.rejected."""
    try:
        yield
    except Refused:
        rejected = target.with_name(f"{target.name}.rejected")
        shutil.rmtree(rejected, ignore_errors=True)
        built.rename(rejected)
        raise


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn "disk full" and "file system read-only" into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise _full(target, error.strerror or "no space") from error
    except Exception as error:
        # safetensors and torch.onnx wrap the system's error in classes of their own
        if "No space left on device" not in str(error) and "os error 28" not in str(error):
            raise
        raise _full(target, "No space left on device") from error


def _full(target: Path, reason: str) -> CompressError:
    return CompressError(
        f"could not write {target.name} ({reason})",
        "free disk space or choose another place; the same command then continues",
    )


def remove(directory: Path, scratch: Path) -> None:
    """Delete a stage directory so that no half-deleted one keeps its name."""
    doomed = scratch / f"{directory.name}.removed"
    shutil.rmtree(doomed, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    directory.rename(doomed)
    shutil.rmtree(doomed)
