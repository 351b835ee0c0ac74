"""A training run on disk: everything needed to go on with the same numbers. No pickle.

One folder per snapshot, `snapshot-<step>`: state.safetensors (weights that train, the objective's
state, optimizer moments, random state) and state.json (the rest). It is written under another
name, flushed to the disk and renamed, and only then is the one before it removed: whatever
moment the power goes, one complete snapshot is there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_PREFIX = "snapshot-"
_PARTIAL, _DOOMED = "snapshot.partial", "snapshot.removed"


@dataclass(frozen=True)
class State:
    """What a snapshot holds.

    Attributes:
        step: finished optimizer steps.
        weights: {name: tensor} of the student and of the objective.
        optimizer: `state_dict()` of the optimizer.
        facts: JSON values that belong to the run.
        random: see `random_state`.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    facts: dict[str, Any]
    random: dict[str, Tensor] = field(default_factory=lambda: random_state())


def random_state() -> dict[str, Tensor]:
    """State of torch's generators, of the CPU and of the GPU in use."""
    found = {"cpu": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Set what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def without_trace(module: nn.Module) -> Iterator[None]:
    """Inside, a module may be called; its buffers and the random state are put back after."""
    random = random_state()
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    set_random_state(random)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes and contents."""
    total = hashlib.sha256()
    for name, value in tensors.items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def write_snapshot(folder: Path, state: State) -> None:
    """Write a snapshot and remove the others; where that fails, the others stay."""
    partial = folder / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(partial, state)
        before = _snapshots(folder)
        target = folder / f"{_PREFIX}{state.step:09d}"
        assert target not in before, "a run that goes on does not come to a saved step again"
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its space back
    flush(folder)
    for old in before:
        _remove(old)


def _write(partial: Path, state: State) -> None:
    tensors, rest = _flatten(state.optimizer)
    tensors |= {f"weights.{name}": value for name, value in state.weights.items()}
    tensors |= {f"random.{name}": value for name, value in state.random.items()}
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    save_file(copies, partial / "state.safetensors")
    content = {"step": state.step, "optimizer": rest, "facts": state.facts}
    (partial / "state.json").write_text(json.dumps(content), encoding="utf-8")
    for place in (*partial.iterdir(), partial):
        flush(place)


def read_snapshot(folder: Path) -> State | None:
    """The newest snapshot of a folder, or None when there is none.

    A folder that was not renamed was not finished, and does not count.
    """
    found = _snapshots(folder)
    if not found:
        return None
    tensors = load_file(found[-1] / "state.safetensors")
    content = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    return State(
        step=content["step"],
        weights=_part(tensors, "weights."),
        optimizer=_unflatten(content["optimizer"], _part(tensors, "optimizer.")),
        facts=content["facts"],
        random=_part(tensors, "random."),
    )


def latest_step(folder: Path) -> int:
    """Finished steps of the newest snapshot; 0 when there is none."""
    found = _snapshots(folder)
    return int(found[-1].name.removeprefix(_PREFIX)) if found else 0


def remove_snapshots(folder: Path) -> None:
    """Delete all snapshots of a folder."""
    for place in _snapshots(folder):
        _remove(place)
    shutil.rmtree(folder / _PARTIAL, ignore_errors=True)


def _snapshots(folder: Path) -> list[Path]:
    found = folder.glob(f"{_PREFIX}*")
    return sorted(p for p in found if p.name.removeprefix(_PREFIX).isdigit())


def _remove(place: Path) -> None:
    """Delete a snapshot; half-deleted it has no name that counts."""
    doomed = place.with_name(_DOOMED)
    shutil.rmtree(doomed, ignore_errors=True)
    place.rename(doomed)
    shutil.rmtree(doomed)


def _flatten(optimizer: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state_dict into tensors and JSON values."""
    tensors: dict[str, Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    for index, entries in optimizer["state"].items():
        is_tensor = {name: isinstance(value, Tensor) for name, value in entries.items()}
        tensors |= {f"optimizer.{index}.{n}": entries[n] for n, yes in is_tensor.items() if yes}
        state[str(index)] = {n: entries[n] for n, yes in is_tensor.items() if not yes}
    return tensors, {"state": state, "param_groups": optimizer["param_groups"]}


def _unflatten(rest: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in rest["state"].items()}
    for name, value in tensors.items():
        index, _, entry = name.partition(".")
        state[int(index)][entry] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
