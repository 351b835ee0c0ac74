"""The whole job: open, check, run the stages that are not done yet, measure, report."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import CompressError
from compressor.model.checkpoint import Checkpoint
from compressor.model.manifest import NAME as MANIFEST
from compressor.model.manifest import Artifact, Manifest, read_manifest, write_manifest
from compressor.run.compare import compare
from compressor.run.layout import SCRATCH, SOURCE, disk_errors, locked
from compressor.run.loading import load_profile
from compressor.run.logs import logged
from compressor.run.preflight import plan_run, refuse_if_too_big
from compressor.run.profile import Profile
from compressor.run.report import write_report
from compressor.run.setting import Setting, open_source
from compressor.run.steps import forget, run_stage
from compressor.run.summary import summary
from compressor.screen import Screen, Silent


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
    return loaded


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
    home, show = Path(out), screen or Silent()
    if redo is not None and not 1 <= redo <= len(loaded.stages):
        raise CompressError(
            f"--redo {redo}: the profile has stages 1 to {len(loaded.stages)}", "--redo 1"
        )
    source, manifest = open_source(str(loaded.model))
    with locked(home), logged(home / "log.txt") as log:
        begin = time.perf_counter()
        opened = _open(home, source.path, manifest)
        setting = Setting(loaded, opened, home, show, log)
        if loaded.data:
            show.say("reading the texts")
            assert setting.corpus
        plan = plan_run(setting)
        refuse_if_too_big(plan)
        if redo is not None:
            forget(home, redo, home / SCRATCH)
        (home / "profile.yaml").write_text(loaded.text, encoding="utf-8")
        checkpoint, artifacts = run_stages(setting)
        bench = compare(setting, artifacts)
        report = summary(setting, plan, bench, time.perf_counter() - begin)
        with disk_errors(home / "report.md"):
            write_report(home, report)
        keep_last(setting)
        return RunResult(home, checkpoint, artifacts, report)


def _open(home: Path, source: Path, manifest: Manifest) -> Checkpoint:
    """Describe the source in 00-source, or refuse a directory that was made from another one."""
    place = home / SOURCE
    if (place / MANIFEST).is_file():
        before = read_manifest(place).base_model
        if before["sha256"] != manifest.base_model["sha256"]:
            raise CompressError(
                f"'{home}' was made from another model ({before['id']})",
                "give a new --out directory",
            )
    else:
        place.mkdir(exist_ok=True)
        write_manifest(place, manifest)
    return Checkpoint(source, read_manifest(place))


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
            before = run_stage(setting, home, number, stage, before)
    return parent, artifacts


def keep_last(setting: Setting) -> None:
    """With `keep: last`, delete the weights of all model stages but the last."""
    if setting.profile.keep != "last":
        return
    models = [s for s in enumerate(setting.profile.stages, start=1) if s[1].kind != "export"]
    for number, stage in models[:-1]:
        directory = setting.home / f"{number:02d}-{stage.method}"
        for file in directory.glob("*.safetensors"):
            file.unlink()


def dump(report: dict[str, Any]) -> str:
    """JSON of a result, as `--json` prints it."""
    return json.dumps(report, indent=1)
