"""What a stage of each kind does to its parent: edit it, search, or export it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compressor.distill import runner
from compressor.errors import CompressError, Refused
from compressor.model.checkpoint import Checkpoint
from compressor.model.manifest import Manifest, quantized
from compressor.model.model import Model
from compressor.model.sparse import revived, zero_places
from compressor.model.spill import Spill
from compressor.quantize.sizes import sizes
from compressor.run.card import SIDE_LOSSES
from compressor.run.export import export_into
from compressor.run.finished import stage_record
from compressor.run.forget import WEIGHTS_REMOVED
from compressor.run.layout import search_place
from compressor.run.methods import learns, load_method
from compressor.run.profile import Stage
from compressor.run.prove import save_and_prove
from compressor.run.search import search
from compressor.run.setting import Setting
from compressor.training.parallel import team
from compressor.training.workbench import Workbench

TRAINS = "trains"  # the leader's word before a training, see training/parallel.py


def make(
    setting: Setting, stage: Stage, parent: Checkpoint, partial: Path, work: Workbench
) -> Manifest:
    """Write what a stage makes of its parent into `partial`, proven; all but the manifest.

    Returns:
        The manifest, without stage record and files.

    Raises:
        CompressError: the parent's weights are gone, or the method refuses.
        Refused: what was written does not agree with the model in memory.
    """
    by_kind = {"export": _export, "search": _search}
    made = by_kind.get(stage.kind, _edit)(setting, stage, parent, partial, work)
    return replace(made, metrics=made.metrics | _side_losses(stage, parent, made))


def _side_losses(stage: Stage, parent: Checkpoint, made: Manifest) -> dict[str, Any]:
    """What side paths are worth: measured by this stage, or by the last one before that did."""
    notes = made.metrics.get("notes", {})
    if not {"validation", "validation_without_side"} <= notes.keys():
        return {k: v for k, v in parent.manifest.metrics.items() if k == SIDE_LOSSES}
    held, without = (notes[k]["after"] for k in ("validation", "validation_without_side"))
    return {SIDE_LOSSES: {"stage": stage.method, "with": held, "without": without}}


def _edit(
    setting: Setting, stage: Stage, parent: Checkpoint, partial: Path, work: Workbench
) -> Manifest:
    """Prune, distill or quantize; the written model is loaded back and must agree.

    Raises:
        CompressError: the parent's weights are gone.
    """
    _refuse_removed(stage, parent)
    if stage.trains:
        team().tell(TRAINS)
    model = edited(setting, stage, parent, work)
    return _proven(stage, model, partial, parent, _spill(stage, work))


def _search(
    setting: Setting, stage: Stage, parent: Checkpoint, partial: Path, work: Workbench
) -> Manifest:
    """Train the candidates; the winner is saved and proven as every model is.

    Raises:
        CompressError: the parent's weights are gone, or no candidate is any good.
    """
    _refuse_removed(stage, parent)
    place = search_place(setting.home, partial.name)
    fingerprint = stage_record(setting, stage, parent).fingerprint
    winner = search(setting, stage, parent, place, work, fingerprint)
    return _proven(stage, winner, partial, parent)


def _export(
    setting: Setting, stage: Stage, parent: Checkpoint, partial: Path, work: Workbench
) -> Manifest:
    reference = None if setting.corpus is None else work
    return export_into(partial, stage, parent, setting.profile.floor, reference)


def _proven(
    stage: Stage, model: Model, partial: Path, parent: Checkpoint, spill: Path | None = None
) -> Manifest:
    try:
        return save_and_prove(model, partial, parent.path, spill)
    except Refused as error:
        raise Refused(f"{stage.method}: {error.what}", error.hint) from error


def _refuse_removed(stage: Stage, parent: Checkpoint) -> None:
    if parent.manifest.metrics.get(WEIGHTS_REMOVED):
        raise CompressError(
            f"{parent.path.name} kept no weights (keep: last), so {stage.method} cannot start",
            "add --redo 1 to make all stages again",
        )


def edited(setting: Setting, stage: Stage, parent: Checkpoint, work: Workbench) -> Model:
    """The parent's model after the method.

    Raises:
        Refused: the method revived zeros that the parent's formats promise.
    """
    spill = _spill(stage, work)
    model = parent.load(spill)
    places = zero_places(model) if spill is None else zero_places(model, Spill(spill).store)
    if setting.profile.dtype:
        model.source_dtype = setting.profile.dtype
    torch.manual_seed(setting.seed_of(stage))
    module = load_method(stage.method)
    if stage.kind == "distill":
        teacher = work.teacher if learns(stage.method) else None
        runner.run(model, module.objective(stage.options, model, teacher), stage.options, work)
    else:
        module.run(model, stage.options, work)
    if quantized(model.formats) and not quantized(parent.manifest.formats):
        model.notes["size"] = sizes(model)
    if lost := revived(model, places):
        raise Refused(
            f"{stage.method} did not keep the zeros of its parent: {lost}",
            "put the stage that prunes behind the one that refills its zeros",
        )
    return model


def _spill(stage: Stage, work: Workbench) -> Path | None:
    """Where weights stay in files while a stage runs; None: they are loaded into memory."""
    return work.scratch if getattr(stage.options, "offload", False) else None
