"""Run one stage: find it made, or make it in scratch and let it land under its name."""

import dataclasses
import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

from compressor.model.checkpoint import Checkpoint
from compressor.model.manifest import write_manifest
from compressor.run.finished import find_stage, stage_record
from compressor.run.forget import drop_weights
from compressor.run.kinds import TRAINS, edited, make
from compressor.run.layout import landing, rejecting, search_place, stage_name
from compressor.run.machine import peak_memory, reset_peak_memory
from compressor.run.parts import sealed
from compressor.run.profile import Stage
from compressor.run.search import clear_candidates
from compressor.run.search_outcome import earlier_seconds, peak_of
from compressor.run.setting import Setting
from compressor.run.shortage import shortages
from compressor.training.parallel import team
from compressor.training.snapshot import latest_step

_MADE = "made"  # the leader's word after a stage, see training/parallel.py


def run_stage(
    setting: Setting, home: Path, number: int, stage: Stage, parent: Checkpoint
) -> Checkpoint:
    """Make stage `number` from its parent, or find it already made; return its directory.

    Raises:
        CompressError: the stage exists with other settings, or the method refuses.
        Refused: the saved model or the exported file does not agree with the model in memory.
    """
    if not team().leads:
        return _follow(setting, home, number, stage, parent)
    made = find_stage(setting, home, number, stage, parent)
    if made is None:
        made = _make(setting, home, number, stage, parent)
    target = home / stage_name(number, stage.method)
    _clear(setting.scratch(target, made.manifest.fingerprint))
    if stage.kind == "search":
        clear_candidates(search_place(setting.home, target.name), drop_weights)
    team().tell(_MADE)
    return made


def _make(
    setting: Setting, home: Path, number: int, stage: Stage, parent: Checkpoint
) -> Checkpoint:
    """Make a stage; where an earlier run of it was stopped, from what that left in scratch."""
    name, wanted = stage_name(number, stage.method), stage_record(setting, stage, parent)
    target = home / name
    place = target.relative_to(setting.home)
    scratch = setting.scratch(target, wanted.fingerprint)
    setting.note(place.as_posix())
    setting.log(f"stage {name} starts")
    for left in (scratch, *scratch.glob("round-*")):
        if latest_step(left):
            of = f" of {left.name}" if left != scratch else ""
            setting.screen.say(f"  continuing after step {latest_step(left)}{of}")
    reset_peak_memory()
    start = time.perf_counter()
    exports = stage.kind == "export"
    with (
        landing(target, scratch, _less_memory(setting, home, number, stage)) as partial,
        rejecting(partial, target) if exports else nullcontext(),
    ):
        work = setting.workbench(stage, scratch)
        manifest = make(setting, stage, parent, partial, work)
        notes = manifest.metrics.get("notes", {})
        record = dataclasses.replace(
            wanted,
            seconds=time.perf_counter() - start + earlier_seconds(notes),
            peak_memory_bytes=max(peak_memory(), peak_of(notes)),
        )
        manifest = dataclasses.replace(
            manifest,
            base_model=parent.manifest.base_model,
            stages=[*parent.manifest.stages, record],
        )
        manifest = sealed(partial, manifest)
        keep_metrics(setting.home / "metrics.jsonl", scratch, place)
        write_manifest(partial, manifest)
    setting.log(f"stage {name} done in {record.seconds:.1f} s")
    return Checkpoint(target, manifest)


def _follow(
    setting: Setting, home: Path, number: int, stage: Stage, parent: Checkpoint
) -> Checkpoint:
    """What the other processes of a torchrun do: train along, then read what the leader made."""
    target = home / stage_name(number, stage.method)
    if team().hear() == TRAINS:
        scratch = setting.scratch(target, stage_record(setting, stage, parent).fingerprint)
        with shortages(target.name, _less_memory(setting, home, number, stage)):
            edited(setting, stage, parent, setting.workbench(stage, scratch))
        team().hear()
    return Checkpoint.open(target)


def _clear(scratch: Path) -> None:
    """Delete the scratch of a finished stage, also what other settings of it left."""
    for leftover in scratch.parent.glob(f"{scratch.stem}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _less_memory(setting: Setting, home: Path, number: int, stage: Stage) -> str:
    """What to type when a stage runs out of memory; --set reaches no baseline or candidate."""
    main = home == setting.home and setting.learns_from is None
    train, length = getattr(stage.options, "train", None), getattr(stage.options, "length", None)
    if main and train is not None and train.batch > 1:
        place = f"--set stages.{number}.train"
        return f"{place}.batch={train.batch // 2} {place}.accumulate={train.accumulate * 2}"
    if main and train is None and getattr(stage.options, "offload", True) is False:
        return f"--set stages.{number}.offload=true"
    if main and length is not None and length > 2:
        return f"--set stages.{number}.length={length // 2}"
    return "free memory, or see compress plan for what each stage needs"


def keep_metrics(file: Path, scratch: Path, stage: Path) -> None:
    """Append what a stage logged while training to the run's metrics.jsonl, once."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    kept = [line for line in lines if json.loads(line)["stage"] != stage.as_posix()]
    own = scratch / "metrics.jsonl"
    for line in own.read_text(encoding="utf-8").splitlines() if own.is_file() else []:
        kept.append(json.dumps({"stage": stage.as_posix()} | json.loads(line)))
    if kept:
        temporary = file.with_suffix(".tmp")
        temporary.write_text("\n".join(kept) + "\n", encoding="utf-8")
        temporary.rename(file)
