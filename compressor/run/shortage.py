"""A full disk and a lack of memory, recognized in one place whichever library reports them."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from compressor.errors import CompressError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES)
# safetensors, torch and torch.onnx wrap the system's error in classes of their own
_FULL_TEXT = re.compile(r"No space left on device|os error 28|Disk quota exceeded")
# Python and numpy, torch on CPU and GPU, oneDNN, C++ and ONNX Runtime, mmap through any library
_MEMORY_TEXT = re.compile(
    r"can't allocate memory|[Ff]ailed to allocate memory|bad_alloc|bad allocation"
    r"|out of memory|Cannot allocate memory|os error 12\b|can't start new thread"
    r"|could not create a primitive$"
)


class Shortage(CompressError):
    """The machine lacks disk or memory; what was finished is kept."""


@contextmanager
def shortages(place: str, lower: str = "") -> Iterator[None]:
    """Turn a shortage inside the block into one sentence.

    Args:
        place: what was being made, e.g. 02-distill.kd.
        lower: what needs less memory there, as a hint; "" names the general way.

    Raises:
        Shortage: the disk is full or read-only, or an allocation failed.
    """
    try:
        yield
    except Exception as error:
        found = shortage(error, place, lower)
        if found is None or isinstance(error, Shortage):
            raise
        raise found from error


def shortage(error: BaseException, place: str = "", lower: str = "") -> Shortage | None:
    """The shortage behind an error, or None when it is something else."""
    causes = list(_causes(error))
    if any(isinstance(c, OSError) and c.errno in _FULL for c in causes) or any(
        _FULL_TEXT.search(str(c)) for c in causes
    ):
        return _unwritten(place, "the disk is full", "No space left on device")
    if isinstance(error, OSError) and error.errno in _READ_ONLY:
        return _unwritten(place, "a file cannot be written", str(error.strerror))
    if any(isinstance(c, MemoryError) or _MEMORY_TEXT.search(str(c)) for c in causes):
        return Shortage(
            f"not enough memory in {place}" if place else "not enough memory",
            (lower or "make batches smaller (--set stages.N.train.batch=4), or see compress plan")
            + "; the same command then continues",
        )
    return None


def _unwritten(place: str, alone: str, reason: str) -> Shortage:
    return Shortage(
        f"could not write {place} ({reason})" if place else alone,
        "free disk space or choose another place; the same command then continues",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
