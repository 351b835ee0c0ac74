"""Processes that measure: their environment, the talk with a worker, what to say when one dies."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from compressor.errors import CompressError

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def environment(threads: int) -> dict[str, str]:
    """This process's variables with a fixed number of threads; libraries read it when imported."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **{name: str(threads) for name in _THREADS}, **quiet}


def died(candidate: str, code: int, stderr: str) -> CompressError:
    """The error for a measuring process that ended before it answered.

    Args:
        candidate: name of what it measured.
        code: its return code, negative for a signal.
        stderr: what it had written.
    """
    lines = stderr.strip().splitlines()
    if code == -signal.SIGKILL:
        reason = "it was killed, most likely because memory ran out"
    elif code < 0:
        reason = f"signal {signal.Signals(-code).name}"
    else:
        reason = lines[-1] if lines else f"exit code {code}"
    return CompressError(
        f"the process measuring '{candidate}' died: {reason}",
        "free memory, or measure fewer or smaller models at a time",
    )


class Worker:
    """A fresh process with one candidate open (measure/worker.py).

    Args:
        name: of the candidate, for messages.
        path: its directory.
        text: held-out batches, as `worker.save_text` wrote them.
        threads: threads of the process, set before anything is imported.
    """

    def __init__(self, name: str, path: Path, text: Path, threads: int) -> None:
        job = {"path": str(path), "threads": threads, "text": str(text)}
        self.name = name
        self._errors = (text.parent / f"worker-{id(self)}.stderr").open("w+", encoding="utf-8")
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
            CompressError: the worker refused, or died.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._died()
        answer = json.loads(line)
        if "error" in answer:
            raise CompressError(answer["error"], answer["hint"])
        return answer

    def _died(self) -> CompressError:
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
