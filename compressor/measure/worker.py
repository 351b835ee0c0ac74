"""A process that holds one candidate and times it when it is told to.

    python -m compressor.measure.worker '{"path": ..., "asked": ..., "device": ...,
                                          "threads": ..., "rows": ...}'

One JSON object per line on stdin, e.g. {"seconds": 0.3} (options of measure/latency.py), is one
round; its result, or {"error", "hint"}, is one line on stdout. It ends when stdin does. `rows` is
a safetensors file with held-out batches as `<i>.<key>`, so that a worker needs no data of its own.

A round also carries `cores`: processor time over wall time of the whole process. One thread can
use one core at most, so this shows that a limit on threads holds, whatever library started them.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file, save_file

from compressor.engines import open_engine_of, serving
from compressor.errors import CompressError
from compressor.measure import latency
from compressor.measure.speed_rows import model_inputs
from compressor.screen import Silent
from compressor.training.workbench import Batch, Workbench

READY = {"ready": True}


def save_rows(batches: list[Batch], file: Path) -> None:
    """Write what a worker reads: every model input of every batch, whatever its kind."""
    tensors = {
        f"{i}.{key}": value.contiguous()
        for i, batch in enumerate(batches)
        for key, value in model_inputs(batch).items()
    }
    save_file(tensors, file)


def load_rows(file: Path) -> list[Batch]:
    """The batches of `save_rows`."""
    found: dict[int, Batch] = {}
    for name, value in load_file(file).items():
        index, key = name.split(".", 1)
        found.setdefault(int(index), {})[key] = value
    return [found[i] for i in sorted(found)]


def serve(job: dict[str, Any], requests: TextIO, answers: TextIO) -> None:
    """Open the candidate, say so, and answer every request."""

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        place, threads = Path(job["path"]), job["threads"]
        name = serving(place, job["asked"])
        engine = open_engine_of(name, place, threads, device=job["device"])
        work = _workbench(Path(job["rows"]))
        answer(READY)
        for line in requests:
            wall, used = time.perf_counter(), time.process_time()
            found = latency.run(engine, latency.Options(**json.loads(line)), work)
            wall, used = time.perf_counter() - wall, time.process_time() - used
            answer(found | {"cores": used / wall})
    except CompressError as error:
        answer({"error": error.what, "hint": error.hint})


def _workbench(rows: Path) -> Workbench:
    batches = load_rows(rows)

    def absent() -> Any:
        raise AssertionError("a worker has no other model")

    return Workbench(
        seed=0,
        device=torch.device("cpu"),
        scratch=rows.parent,
        _screen=Silent(),
        _log=lambda line: None,
        _batches=lambda split, n, **shape: batches,
        _teacher=absent,
        _reference=absent,
    )


if __name__ == "__main__":
    # answers keep the real stdout to themselves; whatever a library prints goes to stderr
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(json.loads(sys.argv[1]), sys.stdin, channel)
