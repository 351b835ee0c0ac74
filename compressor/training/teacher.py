"""A teacher that is asked once: its outputs for every row of a run, kept on disk.

A row costs the teacher one forward pass however many epochs follow, and a resumed run asks
nothing again. Values are float16: 11 bits of mantissa, a relative error of at most 2^-11 = 5e-4
(bfloat16 would have 4e-3); states of normalized layers are far from its limit of 65504. Padding
is not stored. The file is read through a memory map, so it need not fit into memory.
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.errors import CompressError
from compressor.training.batches import mapped, on_device
from compressor.training.parallel import team
from compressor.training.snapshot import digest, flush
from compressor.training.workbench import Batch, Workbench

PREFIX = "teacher."
_DATA, _MARK = "teacher-outputs.bin", "teacher-outputs.json"
_BYTES = 2  # of a float16
_FLUSH_SECONDS = 60.0  # of asking that a killed run may lose


@runtime_checkable
class AsksTeacher(Protocol):
    """An objective whose teacher outputs can be computed beforehand.

    `targets(batch)` gives token-aligned outputs {name: [B, S, width]}; in the batches of
    `with_outputs` they are already there, under PREFIX + name, zero at padding.
    """

    cache_teacher: bool

    def targets(self, batch: Batch) -> dict[str, Tensor]: ...


def given_outputs(batch: Batch) -> dict[str, Tensor]:
    """Teacher outputs that travel with a batch; empty when there are none."""
    return {k.removeprefix(PREFIX): v for k, v in batch.items() if k.startswith(PREFIX)}


def with_outputs(
    batches: Sequence[Batch], objective: AsksTeacher, teacher: torch.nn.Module, work: Workbench
) -> Sequence[Batch]:
    """The same batches with `objective.targets` of every row in them.

    Args:
        batches: of one run; `row` identifies a row, which is always the same text.
        objective: what to ask.
        teacher: the model behind it; outputs of another one are never used.

    Raises:
        CompressError: the disk is too small, or an output does not fit into float16.
    """
    places, tokens, text = _places(batches)
    widths = {k: v.shape[-1] for k, v in _ask(objective, batches[0], work).items()}
    row = sum(widths.values()) * _BYTES
    identity = {"text": text, "teacher": digest(teacher.state_dict()), "widths": widths}
    with team().leader_first():
        done = _known(work.scratch, identity)
        if done["batches"] < len(batches):
            _refuse_small_disk((tokens - done["tokens"]) * row, work)
            _fill(batches, objective, work, identity, done)
    stored = np.memmap(work.scratch / _DATA, np.float16, mode="r")
    return mapped(batches, partial(_answer, stored=stored, places=places, widths=widths))


def _answer(
    batch: Batch, stored: NDArray[np.float16], places: dict[int, int], widths: dict[str, int]
) -> Batch:
    """A batch with the teacher's outputs in it."""
    stored = stored.reshape(-1, sum(widths.values()))
    keep = batch["attention_mask"].bool()
    rows = zip(batch["row"].tolist(), keep.sum(dim=1).tolist(), strict=True)
    found = [stored[places[row] : places[row] + size] for row, size in rows]
    flat = torch.from_numpy(np.concatenate(found).astype(np.float32))
    filled = {}
    for name, part in zip(widths, flat.split(list(widths.values()), dim=-1), strict=True):
        filled[PREFIX + name] = part.new_zeros(*keep.shape, part.shape[-1])
        filled[PREFIX + name][keep] = part
    return batch | filled


def _known(scratch: Path, identity: dict[str, Any]) -> dict[str, int]:
    """{batches, tokens} whose outputs are on disk already, of this very teacher and text."""
    mark = scratch / _MARK
    content = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else {}
    if content.get("identity") != identity:
        return {"batches": 0, "tokens": 0}
    return content["done"]


def _places(batches: Sequence[Batch]) -> tuple[dict[int, int], int, str]:
    """Where each row's tokens start in the file, tokens in all, and a hash of the rows."""
    places: dict[int, int] = {}
    seen: dict[str, Tensor] = {}
    total = 0
    for batch in batches:
        for row, ids, mask in zip(
            batch["row"].tolist(), batch["input_ids"], batch["attention_mask"].bool(), strict=True
        ):
            if row not in places:
                places[row] = total
                seen[str(row)] = ids[mask]
                total += len(seen[str(row)])
    return places, total, digest(seen)


def _fill(
    batches: Sequence[Batch],
    objective: AsksTeacher,
    work: Workbench,
    identity: dict[str, Any],
    done: dict[str, int],
) -> None:
    """Append the outputs of the batches that are not on disk; `_places` has the same order.

    Written as a file and not through a memory map, which a full disk would end with SIGBUS. What
    follows the last flushed batch is asked again, so a row is always computed in the same batch.
    """
    data, total = work.scratch / _DATA, sum(identity["widths"].values())
    known = {row for i in range(done["batches"]) for row in batches[i]["row"].tolist()}
    tokens, saved = done["tokens"], time.perf_counter()
    if not tokens:
        (work.scratch / _MARK).unlink(missing_ok=True)  # it may be of another teacher
    data.touch()
    with (
        data.open("r+b") as file,
        work.progress("teacher outputs", len(batches)) as advance,
    ):
        file.truncate(tokens * total * _BYTES)
        file.seek(0, os.SEEK_END)
        advance(done["batches"])
        for index in range(done["batches"], len(batches)):
            outputs = _new_outputs(batches[index], known, objective, work)
            file.write(outputs.tobytes())
            tokens += len(outputs)
            advance(1)
            last = index + 1 == len(batches)
            if last or time.perf_counter() - saved >= _FLUSH_SECONDS:
                file.flush()
                os.fsync(file.fileno())
                _write_mark(work.scratch, identity, {"batches": index + 1, "tokens": tokens})
                saved = time.perf_counter()


def _new_outputs(
    batch: Batch, known: set[int], objective: AsksTeacher, work: Workbench
) -> NDArray[np.float16]:
    """Outputs [tokens, width] of the real tokens of rows that are not known yet."""
    new = torch.tensor([row not in known for row in batch["row"].tolist()])
    if new.any():
        batch = {key: value[new] for key, value in batch.items()}
        answers = torch.cat([v.half() for v in _ask(objective, batch, work).values()], dim=-1)
        real = answers[batch["attention_mask"].bool()].cpu()
        _refuse_overflow(real)
        known.update(batch["row"].tolist())
        return real.numpy()
    return np.empty((0, 0), np.float16)


def _write_mark(scratch: Path, identity: dict[str, Any], done: dict[str, int]) -> None:
    partial = scratch / f"{_MARK}.partial"
    partial.write_text(json.dumps({"identity": identity, "done": done}), encoding="utf-8")
    flush(partial)
    partial.rename(scratch / _MARK)


@torch.no_grad()
def _ask(objective: AsksTeacher, batch: Batch, work: Workbench) -> dict[str, Tensor]:
    return objective.targets(on_device(batch, work.device))


def _refuse_small_disk(size: int, work: Workbench) -> None:
    free = shutil.disk_usage(work.scratch).free
    work.log(f"teacher outputs take {size / 1e6:.0f} MB of disk until this stage is complete")
    if size > free:
        raise CompressError(
            f"the teacher's outputs need {size / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free",
            "set cache_teacher: false, or give --out on another disk",
        )


def _refuse_overflow(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise CompressError(
            "an output of the teacher is NaN or beyond the range of float16",
            "set cache_teacher: false",
        )
