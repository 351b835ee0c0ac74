"""The output directory: who may use it, what stands in it, how a stage lands in it at once."""

import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import CompressError, Refused
from compressor.model.manifest import NAME as MANIFEST
from compressor.run.shortage import shortages
from compressor.training.snapshot import flush

SOURCE = "00-source"
SCRATCH = ".scratch"
REASON = "refused.txt"  # in a directory NAME.rejected: why
SEARCH = "search"  # candidates of stage NN: search/NN/KK-SHAPE
OURS = (SOURCE, ".lock")


@dataclass(frozen=True)
class Lock:
    """The held lock of an output directory; its file says who works there, and on what.

    Attributes:
        handle: descriptor of the file.
        killed_in: what the run before this one was doing when it ended without a word; else "".
    """

    handle: int
    killed_in: str

    @property
    def place(self) -> str:
        """What is noted."""
        return _noted(self.handle)[1]

    def note(self, place: str) -> None:
        """Say what is being done, for whoever finds the lock."""
        text = f"{os.getpid()} {place}\n".encode()
        os.pwrite(self.handle, text, 0)
        os.ftruncate(self.handle, len(text))


def _noted(handle: int) -> tuple[str, str]:
    """(process, place) that stand in a lock's file; empty after a run that ended by itself."""
    process, _, place = os.pread(handle, 1000, 0).decode().partition("\n")[0].partition(" ")
    return process, place


@contextmanager
def locked(out: Path) -> Iterator[Lock]:
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
        process, place = _noted(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = f" (process {process})" if process else ""
            raise CompressError(
                f"another run is working in '{out}'{who}", "wait for it, or give another --out"
            ) from error
        lock = Lock(handle, place)
        with shortages(".lock"):
            lock.note(place)  # kept by a command that is refused before it does anything
        ended = False
        try:
            yield lock
            ended = True
        finally:
            if ended or lock.place != place:
                os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def stage_name(index: int, method: str) -> str:
    """Directory name of stage `index` (from 1), e.g. 02-distill.kd."""
    return f"{index:02d}-{method}"


def search_place(home: Path, stage: str) -> Path:
    """Where the candidates of a search stage stand, by its directory name."""
    return home / SEARCH / stage[:2]


def stage_directories(home: Path) -> list[Path]:
    """Complete stage directories in order, without the source."""
    found = [d for d in home.glob("[0-9][0-9]-*") if (d / MANIFEST).is_file() and d.name != SOURCE]
    return sorted(d for d in found if not d.name.endswith(".rejected"))


@contextmanager
def landing(target: Path, scratch: Path, lower: str = "") -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends well.

    It stands beside its scratch, so a half-written directory never has the target's name. What
    was written is flushed before the rename: after it, the scratch may go.

    Args:
        target: the directory to make.
        scratch: private folder, on the same file system.
        lower: hint for a lack of memory, see `shortages`.

    Raises:
        Shortage: the disk is full or memory ran out; what was finished before stays.
    """
    partial = scratch / f"{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with shortages(target.name, lower):
        try:
            partial.mkdir(parents=True)
            yield partial
            assert (partial / MANIFEST).is_file(), "the manifest is written last, in the block"
            for place in (*partial.rglob("*"), partial):
                flush(place)
            _arrive(partial, target)
            flush(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its space back


def _arrive(partial: Path, target: Path) -> None:
    """Give a finished directory its name; what was refused under it before goes."""
    if target.exists():
        names = (target.with_name(f"{target.name}.{n}") for n in itertools.count(2))
        kept = next(place for place in names if not place.exists())
        partial.rename(kept)
        raise CompressError(
            f"'{target}' appeared while it was being made", f"the result is in '{kept}'"
        )
    partial.rename(target)
    shutil.rmtree(_rejected(target), ignore_errors=True)


def _rejected(target: Path) -> Path:
    return target.with_name(f"{target.name}.rejected")


@contextmanager
def rejecting(built: Path, target: Path) -> Iterator[None]:
    """Keep what the block refuses under the name `target`.rejected."""
    try:
        yield
    except Refused as error:
        rejected = _rejected(target)
        shutil.rmtree(rejected, ignore_errors=True)
        (built / REASON).write_text(f"{error.what}\n", encoding="utf-8")
        built.rename(rejected)
        raise


def remove(directory: Path, scratch: Path) -> None:
    """Delete a stage directory so that no half-deleted one keeps its name."""
    doomed = scratch / f"{directory.name}.removed"
    shutil.rmtree(doomed, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    directory.rename(doomed)
    shutil.rmtree(doomed)
