"""Run one stage: load its parent, let the method edit the model, save, prove, land."""

import dataclasses
import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from compressor.distill import runner
from compressor.errors import CompressError, Refused
from compressor.model.checkpoint import Checkpoint, load_directory, save
from compressor.model.count import count_parameters
from compressor.model.forward import output_mask, outputs
from compressor.model.layers import QuantTable
from compressor.model.manifest import (
    Manifest,
    StageRecord,
    list_files,
    read_manifest,
    write_manifest,
)
from compressor.model.model import Model
from compressor.model.probe import largest_difference, probe_batches, write_probe
from compressor.model.sources import weight_files
from compressor.run.export import export_into, refuse_below
from compressor.run.fingerprint import portable_options, refuse_change, with_fingerprint
from compressor.run.layout import (
    SCRATCH,
    SEARCH,
    landing,
    rejecting,
    remove,
    search_place,
    stage_name,
)
from compressor.run.machine import (
    give_back_memory,
    machine,
    packages,
    peak_memory,
    reset_peak_memory,
)
from compressor.run.methods import WITHOUT_DATA, WITHOUT_TEACHER, load_method
from compressor.run.profile import Stage
from compressor.run.search import clear_candidates, peak_of, search
from compressor.run.setting import Setting
from compressor.run.shortage import shortages
from compressor.training.parallel import team
from compressor.training.snapshot import latest_step
from compressor.training.workbench import Workbench

_TRAINS, _MADE = "trains", "made"  # the leader's words, see training/parallel.py
WEIGHTS_REMOVED = "weights_removed"  # in manifest.metrics, after keep: last
# Relative error allowed between the model in memory and the same model saved and loaded: storing
# bfloat16 rounds every weight to 8 bits of mantissa; float32 and packed codes lose nothing.
RELOAD_TOLERANCE = {"float32": 1e-6, "float16": 5e-3, "bfloat16": 5e-2}


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
    name, wanted = stage_name(number, stage.method), _record(setting, stage, parent)
    target = home / name
    place = target.relative_to(setting.home)
    scratch = setting.scratch(target, wanted.fingerprint)
    setting.note(place.as_posix())
    setting.log(f"stage {name} starts")
    if latest_step(scratch):
        setting.screen.say(f"  continuing after step {latest_step(scratch)}")
    reset_peak_memory()
    start = time.perf_counter()
    exports = stage.kind == "export"
    make = {"export": _export, "search": _search}.get(stage.kind, _edit)
    with (
        landing(target, scratch, _less_memory(setting, home, number, stage)) as partial,
        rejecting(partial, target) if exports else nullcontext(),
    ):
        work = setting.workbench(stage, scratch)
        manifest = make(setting, stage, parent, partial, work)
        record = dataclasses.replace(
            wanted,
            seconds=time.perf_counter() - start,
            peak_memory_bytes=max(peak_memory(), peak_of(manifest.metrics.get("notes", {}))),
        )
        manifest = dataclasses.replace(
            manifest,
            base_model=parent.manifest.base_model,
            stages=[*parent.manifest.stages, record],
            files=list_files(partial),
            packages=packages(),
            machine=machine(),
        )
        keep_metrics(setting.home / "metrics.jsonl", scratch, place)
        write_manifest(partial, manifest)
    setting.log(f"stage {name} done in {record.seconds:.1f} s")
    return Checkpoint(target, manifest)


def _follow(
    setting: Setting, home: Path, number: int, stage: Stage, parent: Checkpoint
) -> Checkpoint:
    """What the other processes of a torchrun do: train along, then read what the leader made."""
    target = home / stage_name(number, stage.method)
    if team().hear() == _TRAINS:
        scratch = setting.scratch(target, _record(setting, stage, parent).fingerprint)
        with shortages(target.name, _less_memory(setting, home, number, stage)):
            _edited(setting, stage, parent, setting.workbench(stage, scratch))
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
    if main and getattr(stage.options, "offload", True) is False:
        return f"--set stages.{number}.offload=true"
    if main and length is not None and length > 2:
        return f"--set stages.{number}.length={length // 2}"
    return "free memory, or see compress plan for what each stage needs"


def find_stage(
    setting: Setting, home: Path, number: int, stage: Stage, parent: Checkpoint
) -> Checkpoint | None:
    """The finished stage of exactly these settings, or None when it has to be made.

    A baseline made with other settings is deleted: nothing of the user's work is in it.

    Raises:
        CompressError: a stage of other settings stands there.
        Refused: a finished export is below the floor that the profile now asks for.
    """
    target, wanted = home / stage_name(number, stage.method), _record(setting, stage, parent)
    strangers = [d for d in home.glob(f"{number:02d}-*") if d.suffix != ".rejected" and d != target]
    found = read_manifest(target) if target.is_dir() else None
    if found and not strangers and found.stages[-1].fingerprint == wanted.fingerprint:
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


def _record(setting: Setting, stage: Stage, parent: Checkpoint) -> StageRecord:
    method = stage.options.method if stage.kind == "search" else stage.method
    learns = method.startswith("distill.") and method not in WITHOUT_TEACHER
    reads = stage.kind != "export" and stage.method not in WITHOUT_DATA
    record = StageRecord(
        method=stage.method,
        options=portable_options(stage),
        seed=setting.seed_of(stage),
        teacher=setting.teacher_of(stage).manifest.fingerprint if learns else None,
        data=setting.data_record if reads else None,
        seconds=0.0,
        peak_memory_bytes=0,
        parent=parent.manifest.fingerprint,
        fingerprint="",
    )
    return with_fingerprint(record, setting.profile.dtype if stage.kind != "export" else None)


def _edit(
    setting: Setting, stage: Stage, parent: Checkpoint, partial: Path, work: Workbench
) -> Manifest:
    """Prune, distill or quantize; the written model is loaded back and must agree.

    Raises:
        CompressError: the parent's weights are gone.
    """
    _refuse_removed(stage, parent)
    if stage.kind == "distill":
        team().tell(_TRAINS)
    model = _edited(setting, stage, parent, work)
    return save_and_prove(model, partial, parent.path, _spill(stage, work))


def _search(
    setting: Setting, stage: Stage, parent: Checkpoint, partial: Path, work: Workbench
) -> Manifest:
    """Train the candidates; the winner is saved and proven as every model is.

    Raises:
        CompressError: the parent's weights are gone, or no candidate is any good.
    """
    _refuse_removed(stage, parent)
    place = search_place(setting.home, partial.name)
    fingerprint = _record(setting, stage, parent).fingerprint
    winner = search(setting, stage, parent, place, work, fingerprint)
    return save_and_prove(winner, partial, parent.path)


def _refuse_removed(stage: Stage, parent: Checkpoint) -> None:
    if parent.manifest.metrics.get(WEIGHTS_REMOVED):
        raise CompressError(
            f"{parent.path.name} kept no weights (keep: last), so {stage.method} cannot start",
            "add --redo 1 to make all stages again",
        )


def _edited(setting: Setting, stage: Stage, parent: Checkpoint, work: Workbench) -> Model:
    """The parent's model after the method."""
    model = parent.load(_spill(stage, work))
    if setting.profile.dtype:
        model.source_dtype = setting.profile.dtype
    torch.manual_seed(setting.seed_of(stage))
    module = load_method(stage.method)
    if stage.kind == "distill":
        teacher = None if stage.method in WITHOUT_TEACHER else work.teacher
        runner.run(model, module.objective(stage.options, model, teacher), stage.options, work)
    else:
        module.run(model, stage.options, work)
    return model


def _spill(stage: Stage, work: Workbench) -> Path | None:
    """Where weights stay in files while a stage runs; None: they are loaded into memory."""
    return work.scratch if getattr(stage.options, "offload", False) else None


def save_and_prove(
    model: Model, directory: Path, parent: Path, spill: Path | None = None
) -> Manifest:
    """Save a model, load it back, compare, and leave a probe of the loaded one.

    The model is gone afterwards: its weights are given back before the saved ones are loaded, so
    that there is never more than one of the two in memory; with `spill` neither is as a whole.

    Raises:
        Refused: the loaded model gives other outputs than the one in memory, or lost a tie.
    """
    model.module.eval().requires_grad_(False)
    batches = probe_batches(model)
    expected = [outputs(model, batch) for batch in batches]
    tied = _tied(model)
    save(model, directory, parent)
    for name, tensors in model.beside.items():
        tensors.write(directory / name)
    model.module.to("meta")
    give_back_memory()
    tolerance = RELOAD_TOLERANCE[model.source_dtype]
    formats, notes, family = model.formats, model.notes, model.family
    loaded = load_directory(directory, formats, spill)
    exchanges = [(batch, outputs(loaded, batch)) for batch in batches]
    for (batch, got), wanted in zip(exchanges, expected, strict=True):
        errors = largest_difference(wanted, got, output_mask(batch))
        if max(errors.values()) > tolerance:
            raise Refused(
                f"the saved model disagrees with the one in memory ({errors})",
                "NaN or overflow in the stored dtype? try dtype: float32",
            )
    if tied and not _tied(loaded):
        raise Refused("the saved model lost its tied embedding", "report this as a bug")
    write_probe(directory, exchanges)
    metrics: dict[str, Any] = {"parameters": count_parameters(loaded.module), "notes": notes}
    return Manifest(
        "checkpoint", family.model_type, base_model={}, formats=formats, metrics=metrics
    )


def _tied(model: Model) -> bool:
    module: Any = model.module
    head = module.get_output_embeddings()
    if head is None:
        return False
    inner = module.get_input_embeddings()
    # codes first: the weight of a quantized table is made anew whenever it is asked for
    tables = [m.codes_OI if isinstance(m, QuantTable) else m.weight for m in (head, inner)]
    return tables[0].data_ptr() == tables[1].data_ptr()


def _export(
    setting: Setting, stage: Stage, parent: Checkpoint, partial: Path, work: Workbench
) -> Manifest:
    reference = None if setting.corpus is None else work
    return export_into(partial, stage, parent, setting.profile.floor, reference)


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


def forget(home: Path, number: int, scratch: Path) -> None:
    """Delete stage `number` and all after it, with the candidates of searches (--redo)."""
    stages, searches = home.glob("[0-9][0-9]-*"), home.glob(f"{SEARCH}/[0-9][0-9]")
    # candidates first: without their stage they would be taken for those of a killed search
    for directory in [*sorted(searches, reverse=True), *sorted(stages, reverse=True)]:
        if int(directory.name[:2]) >= number:
            remove(directory, scratch)


def drop_weights(directory: Path) -> None:
    """Delete the weights of a stage and say so in its manifest; what else it holds stays."""
    manifest = read_manifest(directory)
    if not manifest.metrics.get(WEIGHTS_REMOVED):
        weights = [file.name for file in weight_files(directory)]
        kept = {name: entry for name, entry in manifest.files.items() if name not in weights}
        metrics = manifest.metrics | {WEIGHTS_REMOVED: True}
        manifest = dataclasses.replace(manifest, files=kept, metrics=metrics)
        write_manifest(directory, manifest)
    for file in directory.glob("*.safetensors"):
        if file.name not in manifest.files:  # also what a killed run did not come to delete
            file.unlink()
