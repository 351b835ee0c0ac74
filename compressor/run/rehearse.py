"""Go through a profile on empty models: what would fail after hours fails now.

Models on the meta device have names, shapes and ties and no weights, so this takes milliseconds.
Wrong tasks, other vocabularies, layers that do not exist and groups that do not divide all show.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from compressor.errors import CompressError
from compressor.model.budget import Shape
from compressor.model.candidates import label
from compressor.model.checkpoint import Checkpoint, load_processor, read_pooling
from compressor.model.families import find_family
from compressor.model.importance_file import find_scores
from compressor.model.manifest import NAME as MANIFEST
from compressor.model.manifest import read_manifest
from compressor.model.model import Model
from compressor.model.scaling import refuse_unfolded, unfolded
from compressor.model.shapes import config_of, empty_model, model_class
from compressor.model.side import stored_ranks
from compressor.model.sources import read_config, resolve
from compressor.model.unpromised import unpromised_zeros
from compressor.prune import earlier, squarehead
from compressor.prune.sparsity import SparseOptions
from compressor.run.fingerprint import used_up
from compressor.run.from_float import instead, refuse_quantized
from compressor.run.layout import stage_name
from compressor.run.measuring import refuse_unfit
from compressor.run.methods import load_method
from compressor.run.profile import Profile, Stage
from compressor.run.rehearse_formats import check_cache, check_groups, check_packed
from compressor.run.rehearse_pruned import pruned
from compressor.run.rehearse_stage import check_known, check_length, check_sparse, named
from compressor.run.search_stages import candidate_stages, planned_shapes


@dataclass(frozen=True)
class _Rehearsal:
    """A profile, those shapes of its searches that were measured, and what the user should read."""

    profile: Profile
    chosen: Mapping[int, Sequence[Shape]]
    remarks: list[str] = field(default_factory=list)


def rehearse(
    profile: Profile,
    source: Checkpoint,
    chosen: Mapping[int, Sequence[Shape]] | None = None,
    home: Path | None = None,
) -> list[str]:
    """Run what can be run of every stage without weights.

    Args:
        chosen: {number of a search stage: the shapes it trains}, where they had to be measured.
        home: output directory; a stage that stands there reads no scores any more.

    Returns:
        What the user should read before the work begins; one sentence each.

    Raises:
        CompressError: what the stage itself would have raised, before any work.
    """
    if home is not None:
        profile = _without_used_scores(profile, home)
    job, made = _Rehearsal(profile, chosen or {}), [empty(source.path)]
    if profile.dtype:
        made[0].config.dtype = getattr(torch, profile.dtype)
    if chosen is None and not (source.path / MANIFEST).is_file():  # read once, not by searches too
        job.remarks.extend(filter(None, [unpromised_zeros(made[0], source.path)]))
    if chosen is None:
        job.remarks.extend(filter(None, [instead(profile, source)]))
    refuse_unfit(profile.measures, source.path)
    _check_teachers(profile)
    refuse_quantized(profile.stages, source)
    check_packed(profile.stages, source)
    made = _rehearse_from(job, made)
    check_cache(profile.stages, source, made)
    for name, stages in profile.baselines.items():
        refuse_quantized(stages, source, main=False)
        check_packed(stages, source)
        _rehearse_baseline(job, name, stages, made)
        with named(f"baseline '{name}'"):
            check_cache(stages, source, [made[0]] * len(stages))
    return list(dict.fromkeys(job.remarks))  # the candidates of a search say the same


def _without_used_scores(profile: Profile, home: Path) -> Profile:
    """The profile as it would be if finished stages had measured the scores that they reused."""

    def rest(place: Path, number: int, stage: Stage) -> Stage:
        made = (place / stage_name(number, stage.method)).is_dir()
        scores = getattr(stage.options, "scores", None)
        if made and scores and (find_scores(scores) or used_up(scores, home)):
            return replace(stage, options=replace(stage.options, scores=None))
        return stage

    def chain(stages: tuple[Stage, ...], place: Path) -> tuple[Stage, ...]:
        return tuple(rest(place, number, stage) for number, stage in enumerate(stages, start=1))

    baselines = {k: chain(v, home / "baselines" / k) for k, v in profile.baselines.items()}
    return replace(profile, stages=chain(profile.stages, home), baselines=baselines)


def _rehearse_baseline(
    job: _Rehearsal, name: str, stages: tuple[Stage, ...], made: list[Model]
) -> None:
    """Go through a baseline; it starts from the source, and stage:N is one of the main chain."""
    own = [made[0]]
    for number, stage in enumerate(stages, start=1):
        own.append(_after(job, f"baselines.{name}.{number}", stage, made, own[-1]))
    with named(f"baseline '{name}'"):
        check_groups(stages, own, [s.name for s in stages if s.kind == "export"])


def _rehearse_from(job: _Rehearsal, made: list[Model]) -> list[Model]:
    """Go through the stages after the first `len(made) - 1`; a search leads to many ends.

    Args:
        made: the source's model and that of every stage before, without weights.

    Returns:
        The same with the models of all stages; after a search, those of its last candidate.
    """
    for number, stage in enumerate(job.profile.stages[len(made) - 1 :], start=len(made)):
        place = f"stages.{number}"
        if stage.kind == "search":
            return _rehearse_search(job, place, stage, made)
        made = [*made, _after(job, place, stage, made, made[-1])]
    exports = [s.name for s in job.profile.stages if s.kind == "export"]
    check_groups(job.profile.stages, made, exports)
    return made


def _rehearse_search(job: _Rehearsal, place: str, stage: Stage, made: list[Model]) -> list[Model]:
    """Go through the two stages of every candidate, and through all that follows with its shape."""
    before, whole = made[-1], made
    planned = job.chosen.get(len(made))
    for shape in planned or planned_shapes(before.family, before.config, stage.options):
        candidate = before
        with named(f"candidate {label(shape)} of {stage.method}"):
            for own in candidate_stages(before.family, stage, shape):
                candidate = _after(job, place, own, made, candidate)
            whole = _rehearse_from(job, [*made, candidate])
    return whole


def _after(job: _Rehearsal, place: str, stage: Stage, made: list[Model], model: Model) -> Model:
    """What a stage makes of `model`; `made` is what stages before may be taken from as teachers."""
    job.remarks.extend(
        f"{stage.method}: {said}" for said in _remarks(job, place, stage, made, model)
    )
    check_known(place, stage, model)
    check_length(place, stage, model)
    check_sparse(place, stage, model)
    with named(f"{place} ({stage.method})"):
        if getattr(stage.options, "unfolded", None) == "refuse":
            refuse_unfolded(model)
        if stage.trains:
            teacher = _teacher(stage.teacher or job.profile.teacher, made)
            objective = load_method(stage.method).objective(stage.options, model, teacher)
            said = getattr(objective, "remarks", ())
            job.remarks.extend(f"{stage.method}: {remark}" for remark in said)
        return pruned(model, stage.options) if stage.kind == "prune" else model


def _remarks(
    job: _Rehearsal, place: str, stage: Stage, made: list[Model], model: Model
) -> list[str]:
    """What the user should read of a stage that its own objective does not say."""
    own, found = stage.options, []
    if isinstance(own, SparseOptions):
        found.append(earlier.remark(model, own))
    if isinstance(own, squarehead.Options) and squarehead.asks_teacher(own):
        before = job.profile.stages[: len(made) - 1] if place.startswith("stages.") else ()
        trained = [number for number, one in enumerate(before, start=1) if one.trains]
        if trained and (stage.teacher or job.profile.teacher) == "input":
            found.append(
                f"its teacher is the input, which never saw what stage {trained[-1]} trained: "
                f"teacher: stage:{trained[-1]} is the model that this one starts from"
            )
    left = unfolded(model) if getattr(own, "unfolded", None) == "plain" else []
    if left:
        found.append(
            f"{len(left)} layers, '{left[0]}' the first, read what cannot be smoothed and are "
            "rounded as they are; unfolded: scale multiplies their inputs at run time"
        )
    return [said for said in found if said]


def _check_teachers(profile: Profile) -> None:
    """Refuse teachers that are not there, before any candidate of a search asks for one."""
    for number, stage in enumerate(profile.stages, start=1):
        _check_teacher(profile, stage, number)
    for name, stages in profile.baselines.items():
        for number, stage in enumerate(stages, start=1):  # stage:N is one of the main chain
            with named(f"baselines.{name}.{number} ({stage.method})"):
                _check_teacher(profile, stage, len(profile.stages) + 1)


def _check_teacher(profile: Profile, stage: Stage, end: int) -> None:
    """Refuse a teacher that does not exist, or no stage before number `end`."""
    name = stage.teacher or profile.teacher
    if not (stage.trains or stage.kind == "search") or name == "input":
        return
    if not name.startswith("stage:"):
        resolve(name)
        return
    earlier = name.removeprefix("stage:")
    if not earlier.isdigit() or not 1 <= int(earlier) < end:
        raise CompressError(
            f"teacher '{name}' is no earlier stage", "teacher: input, or an earlier stage:N"
        )


def empty(path: Path) -> Model:
    """The model of a checkpoint directory without its weights, with the formats of its manifest."""
    raw, manifest = read_config(path), path / MANIFEST
    family, config = find_family(raw["model_type"]), config_of(raw)
    module = empty_model(model_class(family, config), config)
    formats = read_manifest(path).formats if manifest.is_file() else stored_ranks(path)
    return Model(module, family, load_processor(path), formats, pooling=read_pooling(path))


def _teacher(name: str, made: list[Model]) -> Model:
    if name == "input":
        return made[0]
    if name.startswith("stage:"):
        return made[int(name.removeprefix("stage:"))]
    return empty(resolve(name).path)
