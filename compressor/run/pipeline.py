"""The whole job: open, check, run the stages that are not done yet, measure, report."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import CompressError
from compressor.model.checkpoint import Checkpoint
from compressor.model.importance_file import scores_path
from compressor.model.manifest import NAME as MANIFEST
from compressor.model.manifest import Artifact, Manifest, read_manifest, write_manifest
from compressor.run.compare import compare
from compressor.run.finished import find_stage
from compressor.run.forget import WEIGHTS_REMOVED, drop_weights, forget
from compressor.run.from_float import open_model
from compressor.run.layout import SCRATCH, SOURCE, locked, stage_name
from compressor.run.loading import load_profile
from compressor.run.logs import logged
from compressor.run.preflight import plan_run, refuse_if_too_big
from compressor.run.profile import Profile, resolved_text
from compressor.run.report import write_report
from compressor.run.setting import Setting
from compressor.run.shortage import shortages
from compressor.run.steps import run_stage
from compressor.run.summary import summary
from compressor.screen import Screen, Silent
from compressor.training.parallel import joined, refuse_uneven, team


@dataclass(frozen=True)
class RunResult:
    """What a run left: its directory, the last checkpoint, the artefacts, the report."""

    path: Path
    checkpoint: Checkpoint
    artifacts: list[Artifact]
    metrics: dict[str, Any]


def prepare(
    profile: str | Path,
    model: str | None,
    teacher: str | None,
    data: str | None,
    overrides: Sequence[str],
) -> Profile:
    """Load a profile and put the command line's model, teacher and data into it."""
    loaded = load_profile(profile, tuple(overrides))
    changes: dict[str, Any] = {}
    if model:
        changes["model"] = str(model)
    if teacher:
        changes["teacher"] = str(teacher)
    if data:
        changes["data"] = {"train": [str(data)]}
    loaded = dataclasses.replace(loaded, **changes)
    if not loaded.model:
        raise CompressError(f"profile '{loaded.name}' names no model", "add --model CHECKPOINT")
    return dataclasses.replace(loaded, text=resolved_text(loaded))


def run(
    profile: str | Path,
    model: str | None = None,
    out: str | Path = "out",
    teacher: str | None = None,
    data: str | None = None,
    set: Sequence[str] = (),
    redo: int | None = None,
    screen: Screen | None = None,
) -> RunResult:
    """Run a profile; the same call again continues where it stopped.

    Args:
        profile: path of a YAML profile or the name of a shipped one.
        model: directory, hub id or package:NAME; overrides the profile.
        out: output directory, new or of an earlier run of the same model.
        teacher: input, stage:N, a path or a hub id; overrides the profile.
        data: text for training and evaluation; overrides the profile.
        set: "stages.N.KEY=VALUE" texts.
        redo: make this stage (from 1) and all after it again.
        screen: where progress is shown; nowhere by default.

    Raises:
        CompressError: the user must act; nothing half-written is left.
        Refused: something was built and failed its proof.
    """
    loaded = prepare(profile, model, teacher, data, set)
    home = Path(out)
    if redo is not None and not 1 <= redo <= len(loaded.stages):
        raise CompressError(
            f"--redo {redo}: the profile has stages 1 to {len(loaded.stages)}", "--redo 1"
        )
    with joined() as peers:
        refuse_uneven_batches(loaded, peers.size)
        refuse_shared_search(loaded, home, redo, peers.size)
        source = open_model(loaded)
        if not peers.leads:
            return follow(loaded, source, home)
        result = lead(loaded, source, home, redo, screen or Silent())
        peers.tell()
        return result


def lead(
    loaded: Profile, source: Checkpoint, home: Path, redo: int | None, show: Screen
) -> RunResult:
    """The run itself: lock, check, make what is missing, measure, report."""
    with (
        shortages(home.name, "free memory, or give less text"),
        locked(home) as lock,
        logged(home / "log.txt") as log,
    ):
        begin = time.perf_counter()
        if lock.killed_in:
            said = f"the previous run ended in {lock.killed_in} (killed, or out of memory?)"
            show.say(said)
            log(said)
        if team().size > 1:
            log(f"{team().size} processes share every batch")
        refuse_another_model(home, source.manifest)
        setting = Setting(loaded, source, home, show, log, lock.note)
        if loaded.data:
            show.say("reading the texts")
        plan = plan_run(setting)
        refuse_if_too_big(plan)
        check_finished(setting, redo or 0)
        if redo is not None:
            refuse_own_scores(loaded, home, redo)
            forget(home, redo, home / SCRATCH)
        return conduct(setting, plan, begin)


def conduct(setting: Setting, plan: dict[str, Any], begin: float) -> RunResult:
    """Make what is missing, measure, report: a whole run, or that of a search's candidate.

    Args:
        plan: what preflight said, for the report.
        begin: `time.perf_counter()` when the run began.
    """
    home = setting.home
    describe_run(setting)
    checkpoint, artifacts = run_stages(setting)
    setting.note("measuring")
    with shortages("bench.json", "measure fewer models, or close other programs"):
        bench = compare(setting, artifacts)
    report = summary(setting, plan, bench, time.perf_counter() - begin)
    with shortages("report.md"):
        write_report(home, report)
    keep_last(setting)
    shutil.rmtree(home / SCRATCH, ignore_errors=True)
    return RunResult(home, checkpoint, artifacts, report)


def follow(loaded: Profile, source: Checkpoint, home: Path) -> RunResult:
    """Another process of a torchrun: train along, then return what process 0 made."""
    with logged(Path(os.devnull)) as log:
        checkpoint, artifacts = run_stages(Setting(loaded, source, home, Silent(), log))
        team().hear()
        report = json.loads((home / "report.json").read_text(encoding="utf-8"))
        return RunResult(home, checkpoint, artifacts, report)


def refuse_uneven_batches(profile: Profile, processes: int) -> None:
    """Refuse a stage whose batch the processes cannot share equally.

    Raises:
        CompressError: names the stage and the nearest batch.
    """
    chains = {"": profile.stages, **profile.baselines}
    for name, stages in chains.items():
        for number, stage in enumerate(stages, start=1):
            if stage.trains:
                place = f"baselines.{name}.{number}" if name else f"stages.{number}"
                refuse_uneven(stage.options.train.batch, processes, place)


def refuse_shared_search(profile: Profile, home: Path, redo: int | None, processes: int) -> None:
    """Refuse a search that is still to be made under several processes.

    Raises:
        CompressError: names the stage.
    """
    for number, stage in enumerate(profile.stages, start=1):
        name = stage_name(number, stage.method)
        made = (home / name).is_dir() and (redo is None or number < redo)
        if processes > 1 and stage.kind == "search" and not made:
            raise CompressError(
                f"{name} searches in one process, and torchrun started {processes}",
                "run the same command without torchrun until the search is done",
            )


def refuse_another_model(home: Path, manifest: Manifest) -> None:
    """Refuse an output directory that was made from another model.

    Raises:
        CompressError: names the model it was made from.
    """
    if (home / SOURCE / MANIFEST).is_file():
        before = read_manifest(home / SOURCE)
        if before.fingerprint != manifest.fingerprint:
            raise CompressError(
                f"'{home}' was made from another model ({before.base_model['id']})",
                "give a new --out directory",
            )


def refuse_own_scores(profile: Profile, home: Path, redo: int) -> None:
    """Refuse to delete the importance scores that a stage to redo is to reuse.

    Raises:
        CompressError: they lie in a stage from `redo` on, or are gone.
    """
    going = [d.resolve() for d in home.glob("[0-9][0-9]-*") if int(d.name[:2]) >= redo]
    for stage in profile.stages[redo - 1 :]:
        scores = getattr(stage.options, "scores", None)
        if scores and any(scores_path(scores).resolve().is_relative_to(d) for d in going):
            raise CompressError(
                f"--redo {redo} would delete the scores that {stage.method} is to reuse",
                f"copy {scores_path(scores).name} to another place and name that in scores",
            )


def check_finished(setting: Setting, redo: int) -> None:
    """Compare the finished stages before stage `redo` (0: all) with the profile, in order.

    Raises:
        CompressError: a stage has other settings, or kept no weights for the stage to redo.
    """
    parent = setting.source
    for number, stage in enumerate(setting.profile.stages, start=1):
        if number == redo and parent.manifest.metrics.get(WEIGHTS_REMOVED):
            raise CompressError(
                f"{parent.path.name} kept no weights (keep: last), so it has nothing to redo from",
                "--redo 1",
            )
        teacher = stage.teacher or setting.profile.teacher
        unknown = teacher.startswith("stage:") and redo and int(teacher[6:]) >= redo
        if number == redo or unknown:
            return
        found = find_stage(setting, setting.home, number, stage, parent)
        if found is None:
            return
        parent = parent if stage.kind == "export" else found


def describe_run(setting: Setting) -> None:
    """Write what the run starts from: 00-source (no weights) and the resolved profile."""
    place = setting.home / SOURCE
    if not (place / MANIFEST).is_file():
        place.mkdir(exist_ok=True)
        write_manifest(place, dataclasses.replace(setting.source.manifest, files={}, metrics={}))
    temporary = setting.home / ".profile.tmp"
    temporary.write_text(setting.profile.text, encoding="utf-8")
    temporary.rename(setting.home / "profile.yaml")


def run_stages(setting: Setting) -> tuple[Checkpoint, list[Artifact]]:
    """Run the profile's stages and its baselines in order; finished ones are skipped."""
    stages = setting.profile.stages
    parent, artifacts = setting.source, []
    for number, stage in enumerate(stages, start=1):
        setting.screen.say(f"[{number}/{len(stages)}] {stage.method}")
        made = run_stage(setting, setting.home, number, stage, parent)
        if stage.kind == "export":
            artifacts.append(Artifact(made.path, made.manifest, str(made.manifest.engine)))
        else:
            parent = made
    for name, baseline in setting.profile.baselines.items():
        setting.screen.say(f"baseline {name}: " + ", ".join(s.method for s in baseline))
        home, before = setting.home / "baselines" / name, setting.source
        home.mkdir(parents=True, exist_ok=True)
        for number, stage in enumerate(baseline, start=1):
            made = run_stage(setting, home, number, stage, before)
            before = before if stage.kind == "export" else made
    return parent, artifacts


def keep_last(setting: Setting) -> None:
    """With `keep: last`, delete the weights of all model stages but the last of each size."""
    if setting.profile.keep != "last":
        return
    stages = enumerate(setting.profile.stages, start=1)
    models = [(n, stage_name(n, s.method)) for n, s in stages if s.kind != "export"]
    for number, name in models[:-1]:
        if number not in setting.profile.finished_sizes:
            drop_weights(setting.home / name)
