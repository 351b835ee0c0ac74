"""Shapes of a wanted latency: measured on this machine, each once, and never again on resume.

Latency is taken as affine in the MLP's width. Of a combination of depth, heads and hidden the
widest and the narrowest MLP are measured, the width that should meet the target lies on the line
between, and it counts only if its own measurement is within the tolerance. Latency grows with
every size: what is smaller than a shape that is too fast, or larger than one that is too slow
with the narrowest MLP, is not measured at all.

A measurement is the median of ROUNDS rounds of measure/latency.py in a fresh process of pinned
threads: one decode step after a prompt for decoders, one forward for the others, one row.
"""

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from compressor.errors import CompressError
from compressor.measure.process import Worker
from compressor.measure.worker import save_rows
from compressor.model.budget import LEAST, Shape
from compressor.model.candidates import label, nearest_width, spread
from compressor.model.checkpoint import Checkpoint
from compressor.model.saving import save
from compressor.model.shapes import axes_of
from compressor.model.shrink import Kept, shrink
from compressor.run.machine import give_back_memory, machine
from compressor.run.outputs import replace_files
from compressor.search.minitron import Options
from compressor.training.workbench import Workbench

STORED = "latency.json"
ROUNDS, SECONDS = 5, 0.2


@dataclass(frozen=True)
class Latencies:
    """Milliseconds by shape; what was measured once is read from the file.

    Attributes:
        place: directory of the file.
        known: {label of a shape: milliseconds}.
        measure: times one shape.
        circumstances: {cpu, threads, length} under which the numbers hold.
    """

    place: Path
    known: dict[str, float]
    measure: Callable[[Shape], float]
    circumstances: dict[str, Any]

    def __call__(self, shape: Shape) -> float:
        """Milliseconds of a shape; a new measurement is stored before anything else is done."""
        name = label(shape)
        if name not in self.known:
            self.known[name] = self.measure(shape)
            content = self.circumstances | {"milliseconds": self.known}
            replace_files(self.place, {STORED: json.dumps(content, indent=1)})
        return self.known[name]


def open_latencies(
    place: Path, stage: str, parent: Checkpoint, options: Options, work: Workbench
) -> Latencies:
    """The latencies measured in `place` so far, and the means to measure more.

    Raises:
        CompressError: they were measured on another machine.
    """
    given = {"cpu": machine()["cpu"], "threads": options.threads, "length": options.length}
    file, known = place / STORED, {}
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        known = content.pop("milliseconds")
        if content != given:
            raise CompressError(
                f"the latencies of {stage} were measured on another machine ({content['cpu']})",
                f"add --redo {int(stage[:2])} to measure and search here",
            )
    return Latencies(place, known, lambda shape: measured(parent, shape, options, work), given)


def measured(parent: Checkpoint, shape: Shape, options: Options, work: Workbench) -> float:
    """Milliseconds of the parent cut to `shape`, untrained, in a fresh process.

    Raises:
        CompressError: the process was killed, or found too little memory.
    """
    with tempfile.TemporaryDirectory(dir=work.scratch) as scratch:
        rows, directory = Path(scratch) / "rows.safetensors", Path(scratch) / "model"
        directory.mkdir()
        batches = work.batches("calibration", 4, batch=4, length=options.length)
        save_rows(list(batches), rows)
        _save_cut(parent, shape, directory)
        give_back_memory()  # the process that is timed loads the model again
        request = {"length": options.length, "batches": (), "prompts": (), "seconds": SECONDS}
        with closing(Worker(label(shape), directory, rows, options.threads)) as worker:
            worker.hear()
            return median(worker.ask(request)["p50"] for _ in range(ROUNDS))


def _save_cut(parent: Checkpoint, shape: Shape, directory: Path) -> None:
    model = parent.load()
    if shape != model.sizes:
        shrink(model, Kept.first(model, shape))
    save(model, directory, parent.path)


def within_latency(
    before: Shape, cells: Sequence[Shape], options: Options, latency: Latencies
) -> list[Shape]:
    """At most `options.candidates` shapes whose measured latency is near the wanted share.

    Args:
        before: sizes of the original.
        cells: combinations of depth, heads and hidden, with the original's MLP.

    Raises:
        CompressError: none is; the hint names the nearest that was measured.
    """
    assert options.latency is not None
    target, found, tried = latency(before) * options.latency, [], []
    fast, slow = [], []  # cells that cannot be slowed down, or sped up, to the target
    for cell in spread(before, cells, len(cells)):
        if any(_fits(cell, other) for other in fast) or any(_fits(other, cell) for other in slow):
            continue
        shapes, verdict = _fill(cell, target, options, latency)
        tried += shapes
        {"fast": fast, "slow": slow}.get(verdict, []).append(cell)
        near = [s for s in shapes if abs(latency(s) / target - 1) <= options.tolerance]
        found += [s for s in near if s != before]
        if len(found) >= options.candidates:
            return found[: options.candidates]
    if not found:
        raise _out_of_reach(before, tried, options, latency)
    return found


def _fill(
    cell: Shape, target: float, options: Options, latency: Latencies
) -> tuple[list[Shape], str]:
    """The shapes of a cell that may meet the target, and whether all are too `fast` or `slow`."""
    if options.mlp is not None:
        return [cell | {"mlp": mlp} for mlp in options.mlp], ""
    whole, wide = cell["mlp"], latency(cell)
    if wide <= target * (1 + options.tolerance):
        return [cell], "fast" if wide < target * (1 - options.tolerance) else ""
    narrow = cell | {"mlp": nearest_width(math.ceil(whole * LEAST), whole, options)}
    least = latency(narrow)
    if least >= target * (1 - options.tolerance) or wide <= least:
        return [narrow], "slow" if least > target * (1 + options.tolerance) else ""
    exact = narrow["mlp"] + (whole - narrow["mlp"]) * (target - least) / (wide - least)
    return [cell | {"mlp": nearest_width(exact, whole, options)}], ""


def _fits(small: Shape, large: Shape) -> bool:
    return all(small[axis] <= large[axis] for axis in axes_of(large))


def _out_of_reach(
    before: Shape, tried: list[Shape], options: Options, latency: Latencies
) -> CompressError:
    whole = latency(before)
    shape = min(tried, key=lambda s: abs(latency(s) / whole - (options.latency or 0)))
    share = latency(shape) / whole
    return CompressError(
        f"no shape in these lists takes {options.latency} of the original's {whole:.3g} ms within "
        f"{options.tolerance:.1%}",
        f"the nearest, {label(shape)}, takes {latency(shape):.3g} ms: write latency: {share:.3f}, "
        "or give other lists",
    )
