"""A teacher that is asked once: its outputs for every row of a run, kept on disk.

A row costs the teacher one forward pass however many epochs follow, and a resumed run asks
nothing again. A token is one record of the file, with a field for each output. Numbers are
float16: 11 bits of mantissa, a relative error of at most 2^-11 = 5e-4 (bfloat16 would have 4e-3).
States of normalized layers are far from its limit of 65504; of log-probabilities that error
weighs p |log p| 2^-11, in all at most the entropy times 2^-11, which no training notices. Ids stay
integers, of two bytes where the vocabulary fits. Padding is not stored. The file is read through
a memory map, so it need not fit into memory.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
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
_FLUSH_SECONDS = 60.0  # of asking that a killed run may lose


@runtime_checkable
class AsksTeacher(Protocol):
    """An objective whose teacher outputs can be computed beforehand.

    `targets(batch)` gives token-aligned outputs {name: [B, S, width]}, float32, or uint16 or
    int32 ids; in the batches of `with_outputs` they are already there, under PREFIX + name, as
    float32 or int64, zero at padding.
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
    record = _record(_ask(objective, batches[0], work))
    identity = {"text": text, "teacher": digest(teacher.state_dict()), "record": str(record)}
    with team().leader_first():
        done = _known(work.scratch, identity)
        if done["batches"] < len(batches):
            _refuse_small_disk((tokens - done["tokens"]) * record.itemsize, work)
            label = f"teacher outputs, {tokens * record.itemsize / 1e6:.0f} MB of disk"
            with work.progress(label, len(batches)) as advance:
                _fill(batches, objective, work, identity, record, done, advance)
    stored = np.memmap(work.scratch / _DATA, record, mode="r")
    return mapped(batches, partial(_answer, stored=stored, places=places))


def _record(outputs: dict[str, Tensor]) -> np.dtype:
    """What the file holds of one token."""
    kinds = {torch.uint16: "<u2", torch.int32: "<i4"}
    fields = [(k, kinds.get(v.dtype, "<f2"), (v.shape[-1],)) for k, v in outputs.items()]
    return np.dtype(fields)


def _answer(batch: Batch, stored: NDArray[Any], places: dict[int, int]) -> Batch:
    """A batch with the teacher's outputs in it."""
    keep = batch["attention_mask"].bool()
    rows = zip(batch["row"].tolist(), keep.sum(dim=1).tolist(), strict=True)
    found = [stored[places[row] : places[row] + size] for row, size in rows]
    flat, filled = np.concatenate(found), {}
    for name in flat.dtype.names or ():
        values = torch.from_numpy(flat[name].astype("f4" if flat[name].dtype == "f2" else "i8"))
        filled[PREFIX + name] = values.new_zeros(*keep.shape, values.shape[-1])
        filled[PREFIX + name][keep] = values
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
    record: np.dtype,
    done: dict[str, int],
    advance: Callable[[int], None],
) -> None:
    """Append the outputs of the batches that are not on disk; `_places` has the same order.

    Written as a file and not through a memory map, which a full disk would end with SIGBUS. What
    follows the last flushed batch is asked again, so a row is always computed in the same batch.
    """
    data = work.scratch / _DATA
    known = {row for i in range(done["batches"]) for row in batches[i]["row"].tolist()}
    tokens, saved = done["tokens"], time.perf_counter()
    if not tokens:
        (work.scratch / _MARK).unlink(missing_ok=True)  # it may be of another teacher
    data.touch()
    with data.open("r+b") as file:
        file.truncate(tokens * record.itemsize)
        file.seek(0, os.SEEK_END)
        advance(done["batches"])
        for index in range(done["batches"], len(batches)):
            outputs = _new_outputs(batches[index], known, objective, record, work)
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
    batch: Batch, known: set[int], objective: AsksTeacher, record: np.dtype, work: Workbench
) -> NDArray[Any]:
    """Records [tokens] of the real tokens of rows that are not known yet."""
    new = torch.tensor([row not in known for row in batch["row"].tolist()])
    if new.any():
        batch = {key: value[new] for key, value in batch.items()}
        real = batch["attention_mask"].bool().numpy()
        found = np.empty(int(real.sum()), record)
        for name, values in _ask(objective, batch, work).items():
            values = values.half() if values.is_floating_point() else values
            found[name] = values.cpu().numpy()[real]
            _refuse_overflow(found[name])
        known.update(batch["row"].tolist())
        return found
    return np.empty(0, record)


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
            "set cache_teacher: false or a smaller top_k, or give --out on another disk",
        )


def _refuse_overflow(values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise CompressError(
            "an output of the teacher is NaN or beyond the range of float16",
            "set cache_teacher: false, or top_k: null",
        )
