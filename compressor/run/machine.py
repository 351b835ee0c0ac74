"""What this machine is and has: for manifests, preflight and honest tables."""

import contextlib
import ctypes
import ctypes.util
import gc
import os
import platform
import re
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from compressor.engines import EXTRAS

PACKAGES = (
    *("compress", "torch", "transformers", "onnx", "onnxruntime", "safetensors"),
    *("compressed-tensors", "numpy"),
)


def machine() -> dict[str, Any]:
    """{cpu, threads, memory_bytes}: CPU model, threads torch uses, memory this process may use."""
    return {"cpu": _cpu(), "threads": torch.get_num_threads(), "memory_bytes": memory_limit()}


def packages() -> dict[str, str]:
    """Versions of the packages that decide results, and of Python."""
    wanted = [*PACKAGES, *(extra.package for extra in EXTRAS.values()), "lm-eval"]
    found = {"python": platform.python_version()}
    for package in wanted:
        with contextlib.suppress(metadata.PackageNotFoundError):  # or under another name, as -gpu
            found[package] = metadata.version(package)
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def memory_limit() -> int:
    """Bytes of memory: physical, or the container's limit when that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(physical, int(text)) if text.isdigit() else physical


def memory_available() -> int:
    """Bytes that can be taken now without swapping; the limit where the system does not tell."""
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.is_file() else None
    return min(memory_limit(), int(found.group(1)) * 1024) if found else memory_limit()


def disk_free(directory: Path) -> int:
    """Free bytes of the file system that holds, or will hold, `directory`."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def reset_peak_memory() -> None:
    """Start a new measurement of this process's peak memory (Linux; elsewhere a no-op)."""
    give_back_memory()
    control = Path("/proc/self/clear_refs")
    if control.exists():
        control.write_text("5")


def give_back_memory() -> None:
    """Give back to the system what was freed: the C library keeps much of it otherwise.

    Without it every later stage would show the peak of the largest one.
    """
    gc.collect()
    library = ctypes.util.find_library("c")
    if library and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(library), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def peak_memory() -> int:
    """Peak resident bytes of this process since the last reset."""
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found:
            return int(found.group(1)) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_speed(dtype: torch.dtype = torch.float32, seconds: float = 0.2) -> float:
    """Floating-point operations per second of a 1024-cube matrix product on this machine now."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    _ = a @ b
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        _ = a @ b
        rounds += 1
    return rounds * 2 * 1024**3 / (time.perf_counter() - start)
