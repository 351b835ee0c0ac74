"""Tensors that live in files: what is not in use need not stay in memory.

A spilled tensor is a shared mapping of a file that has no name any more, so the disk gets it back
with the last reference to it, whatever happens to the process. The kernel may write its pages out
and drop them at any time; they count as file pages, not as anonymous memory.
"""

import ctypes
import mmap
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_DONTNEED = 4  # MADV_DONTNEED
_MMAP_THRESHOLD, _LARGE = -3, 2**20  # M_MMAP_THRESHOLD, bytes


class Spill:
    """Makes tensors that live in files of a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        _return_what_is_freed()

    def store(self, tensor: Tensor) -> Tensor:
        """A contiguous copy that lives in a file.

        Raises:
            OSError: the disk is full.
        """
        handle, name = tempfile.mkstemp(dir=self.folder)
        try:
            # a hole that the disk has no room for would kill the process when it is written
            os.posix_fallocate(handle, 0, max(1, tensor.nbytes))
            flat = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(handle)
            os.unlink(name)
        found = flat.view(tensor.shape)
        self.rewrite(found, tensor)
        return found

    def rewrite(self, stored: Tensor, tensor: Tensor) -> None:
        """Put other values into a stored tensor, and take its pages out of this process."""
        stored.copy_(tensor)
        if sys.platform == "linux":
            start = stored.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            length = ctypes.c_size_t(stored.data_ptr() + stored.nbytes - start)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), length, _DONTNEED)


def _return_what_is_freed() -> None:
    """Have the C library give large freed blocks back at once, in this process from now on.

    By itself glibc learns to keep blocks of up to 32 MB for later, and what it keeps grew with
    every block of a model that was walked through.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if tune is not None:
        tune(_MMAP_THRESHOLD, _LARGE)
