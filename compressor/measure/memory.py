"""Peak memory: the largest resident set of a fresh process that loads one candidate and runs it.

A candidate of ONNX Runtime is run with onnxruntime and numpy only, as a deployment would: torch
is not imported there, since it is not needed to serve the file. A torch candidate pays for torch
and transformers. `baseline_bytes` is what the process held after its imports and before loading,
so that peak minus baseline is the model and its work. The work is one forward of `batch` rows
(speed_rows.py); a decoder keeps the cache it makes. See footprint.py for the process.
"""

import json
import subprocess
import sys

from pydantic import Field
from safetensors.torch import save_file

from compressor.engines import Engine
from compressor.measure.inputs import fitting_length
from compressor.measure.process import died, environment
from compressor.measure.speed_rows import speed_rows
from compressor.model.checkpoint import read_task
from compressor.options import options
from compressor.training.workbench import Workbench


@options
class Options:
    """The work of the process."""

    batch: int = Field(1, ge=1, description="rows")
    length: int = Field(128, ge=1, description="tokens per row of text")
    threads: int = Field(1, ge=1, description="threads the engine may use")


def run(engine: Engine, options: Options, work: Workbench) -> dict[str, float]:
    """Start a process for `engine.path`, let it work once and ask for its peak.

    Returns:
        peak_memory_bytes and baseline_bytes.

    Raises:
        CompressError: the process died, e.g. because memory ran out.
    """
    length = fitting_length(engine.path, options.length)
    rows = speed_rows(work, options.batch, length)
    inputs = work.scratch / "footprint.safetensors"
    save_file({key: value.contiguous() for key, value in rows.items()}, inputs)
    prefill = read_task(engine.path) == "causal-lm"
    job = {"engine": engine.name, "path": str(engine.path), "inputs": str(inputs)}
    job |= {"threads": options.threads, "prefill": prefill}
    done = subprocess.run(
        [sys.executable, "-m", "compressor.measure.footprint", json.dumps(job)],
        capture_output=True,
        text=True,
        env=environment(options.threads),
    )
    if done.returncode != 0:
        raise died(engine.path.name, done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
