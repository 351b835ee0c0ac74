"""Processes that measure: their environment, the talk with a worker, what to say when one dies."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from compressor.errors import CompressError

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# what Python and numpy, torch, ONNX Runtime and C++ say when an allocation fails
_NO_MEMORY = re.compile(r"MemoryError|can't allocate memory|Failed to allocate memory|bad_alloc")
_REFUSAL = f"{CompressError.__module__}.{CompressError.__qualname__}: "  # ends a traceback


def environment(threads: int) -> dict[str, str]:
    """This process's variables with a fixed number of threads; libraries read it when imported."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **{name: str(threads) for name in _THREADS}, **quiet}


def died(candidate: str, code: int, stderr: str) -> Exception:
    """The error for a measuring process that ended before it answered.

    A CompressError where the user can act: it was killed, found too little memory, or refused the
    candidate. Any other traceback is a fault of ours and comes as a RuntimeError.

    Args:
        candidate: name of what it measured.
        code: its return code, negative for a signal.
        stderr: what it had written.
    """
    last = stderr.strip().rpartition("\n")[2] or f"exit code {code}"
    what = f"the process measuring '{candidate}' died: "
    if code == -signal.SIGKILL:
        reason = "it was killed, most likely because memory ran out"
    elif code < 0:
        reason = f"signal {signal.Signals(-code).name}"
    elif _NO_MEMORY.search(stderr):
        reason = f"memory ran out ({last})"
    elif last.startswith(_REFUSAL):
        return CompressError(what + last.removeprefix(_REFUSAL), "make or copy it again")
    else:
        return RuntimeError(what + last)
    return CompressError(what + reason, "free memory, or measure fewer or smaller models at a time")


class Worker:
    """A fresh process with one candidate open (measure/worker.py).

    Args:
        name: of the candidate, for messages.
        path: its directory.
        rows: file with held-out batches, as `worker.save_rows` wrote them.
        threads: threads of the process, set before anything is imported.
        asked, device: what runs it, see `serving` and `open_engine_of`.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        rows: Path,
        threads: int,
        asked: str | None = None,
        device: str = "cpu",
    ) -> None:
        job = {"path": str(path), "threads": threads, "rows": str(rows)}
        job |= {"asked": asked, "device": device}
        self.name = name
        self._errors = (rows.parent / f"worker-{id(self)}.stderr").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "compressor.measure.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(threads),
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer; blocks until it is there. See also `hear`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died() from error
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            CompressError: the worker refused, or was killed.
            RuntimeError: it crashed.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._died()
        answer = json.loads(line)
        if "error" in answer:
            raise CompressError(answer["error"], answer["hint"])
        return answer

    def _died(self) -> Exception:
        code = self.process.wait()
        self._errors.seek(0)
        return died(self.name, code, self._errors.read())

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # an unsent request; nobody is left to read it
                stream.close()
        self._errors.close()
