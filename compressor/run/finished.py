"""What a stage would be, and whether it stands already."""

from pathlib import Path

from compressor.errors import CompressError
from compressor.model.checkpoint import Checkpoint
from compressor.model.manifest import Manifest, StageRecord, read_manifest, wrong_size
from compressor.run.card import CARD
from compressor.run.export import refuse_below
from compressor.run.fingerprint import portable_options, refuse_change, with_fingerprint
from compressor.run.forget import forget
from compressor.run.layout import SCRATCH, rejecting, stage_name
from compressor.run.methods import WITHOUT_DATA, learns
from compressor.run.profile import Stage
from compressor.run.setting import Setting


def find_stage(
    setting: Setting, home: Path, number: int, stage: Stage, parent: Checkpoint
) -> Checkpoint | None:
    """The finished stage of exactly these settings, or None when it has to be made.

    A baseline made with other settings, or cut short, is deleted: nothing of the user's work is in
    it.

    Raises:
        CompressError: a stage of other settings stands there, or one that was cut short.
        Refused: a finished export is below the floor that the profile now asks for.
    """
    target = home / stage_name(number, stage.method)
    strangers = [d for d in home.glob(f"{number:02d}-*") if d.suffix != ".rejected" and d != target]
    found = read_manifest(target) if target.is_dir() else None
    wanted = stage_record(setting, stage, parent, found)
    if found and not strangers and found.stages[-1].fingerprint == wanted.fingerprint:
        if problem := _cut_short(target, found):
            if home != setting.home:
                forget(home, number, setting.home / SCRATCH)
                return None
            raise CompressError(
                problem, f"put it back, or add --redo {number} to make the stage again"
            )
        if stage.kind == "export":
            with rejecting(target, target):
                refuse_below(found.metrics["fidelity"], setting.profile.floor)
        return Checkpoint(target, found)
    if home != setting.home:
        forget(home, number, setting.home / SCRATCH)
    elif strangers:
        raise CompressError(
            f"stage {number} of this directory is {strangers[0].name}, the profile says "
            f"{target.name}",
            f"add --redo {number} to replace it, or give another --out",
        )
    elif found:
        refuse_change(number, found.stages[-1], wanted)
    return None


def _cut_short(target: Path, manifest: Manifest) -> str:
    """Which file of a finished stage is cut short or gone, "" for none; digests are for verify."""
    for name, stated in manifest.files.items():
        if name != CARD and (problem := wrong_size(target / name, stated)):  # people write in cards
            return f"'{target.name}/{name}' of a finished stage is not as it was written: {problem}"
    return ""


def stage_record(
    setting: Setting, stage: Stage, parent: Checkpoint, made: Manifest | None = None
) -> StageRecord:
    """The record that stage gets when it is made, without what only making it can tell."""
    method = stage.options.method if stage.kind == "search" else stage.method
    reads = stage.kind != "export" and stage.method not in WITHOUT_DATA
    record = StageRecord(
        method=stage.method,
        options=portable_options(stage, setting.home, made),
        seed=setting.seed_of(stage),
        teacher=setting.teacher_of(stage).manifest.fingerprint if learns(method) else None,
        data=setting.data_record if reads else None,
        seconds=0.0,
        peak_memory_bytes=0,
        parent=parent.manifest.fingerprint,
        fingerprint="",
    )
    return with_fingerprint(record, setting.profile.dtype if stage.kind != "export" else None)
