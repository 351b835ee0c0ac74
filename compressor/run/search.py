"""Drive a search: every candidate is an ordinary run of two stages, and the best one stays.

Candidate K of stage NN has the directory D/search/NN/KK-SHAPE with a profile, stages and a report
of its own, so a search that was killed goes on where it stopped and ends with the same bits. They
share the corpus, one measurement of importance and the teacher's checkpoint. The winner has the
least loss on the validation split; held-out text is never looked at. A candidate whose training
gives NaN is noted and loses. Once the stage has landed, the weights of all candidates are deleted;
their reports stay.
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compressor.errors import Refused
from compressor.model.beside import TensorFile
from compressor.model.budget import Shape, itemsize
from compressor.model.candidates import Counts, grid
from compressor.model.checkpoint import Checkpoint
from compressor.model.importance_file import NAME as IMPORTANCE
from compressor.model.manifest import read_manifest
from compressor.model.model import Model
from compressor.prune.scores import layers_to_go, score
from compressor.run.layout import SCRATCH, remove, stage_directories, stage_name
from compressor.run.outputs import replace_files
from compressor.run.profile import Profile, Stage, resolved_text
from compressor.run.rehearse import empty, rehearse
from compressor.run.search_latency import Latencies, open_latencies, within_latency
from compressor.run.search_outcome import FAILED, best_of, outcome
from compressor.run.search_stages import candidate_name, candidate_stages, planned_shapes
from compressor.run.setting import Setting
from compressor.run.tables import clock, millions, threads
from compressor.screen import Screen
from compressor.training.loop import NotFinite
from compressor.training.workbench import Workbench

_RECORD, _CLEARED = "search.json", "cleared"
_DONE = "report.html"  # what a run writes last


@dataclass(frozen=True)
class Search:
    """One search stage at work.

    Attributes:
        setting: the run it is part of.
        stage: its method and options.
        parent: the checkpoint every candidate is cut from.
        place: directory of the candidates.
        model: the parent without weights.
        work: the surroundings of the stage.
        fingerprint: of the stage.
        earlier: seconds that attempts before this one took.
        begin: `time.perf_counter()` when this one began.
    """

    setting: Setting
    stage: Stage
    parent: Checkpoint
    place: Path
    model: Model
    work: Workbench
    fingerprint: str
    earlier: float
    begin: float

    def note_time(self) -> None:
        """Store the seconds of all attempts so far; a kill loses those of one candidate."""
        spent = self.earlier + time.perf_counter() - self.begin
        content = {"fingerprint": self.fingerprint, "seconds": spent}
        replace_files(self.place, {_RECORD: json.dumps(content)})


def search(
    setting: Setting,
    stage: Stage,
    parent: Checkpoint,
    place: Path,
    work: Workbench,
    fingerprint: str,
) -> Model:
    """Train all candidates that are not trained yet; the winner, its notes hold the whole table.

    Args:
        place: directory of the candidates; those of other settings are deleted.
        work: of the search stage; calibration rows are what is timed.
        fingerprint: of the search stage.

    Raises:
        CompressError: no shape meets the budget, or every candidate failed.
    """
    begin = time.perf_counter()
    earlier = _claim(setting, place, fingerprint)
    model = empty(parent.path)
    if setting.profile.dtype:
        model.config.dtype = getattr(torch, setting.profile.dtype)
    job = Search(setting, stage, parent, place, model, work, fingerprint, earlier, begin)
    try:
        job.note_time()  # the directory says whose it is before anything is in it
        shapes, times = _shapes(job)
        rows = _train_all(job, shapes, _scores(job, shapes))
    finally:
        job.note_time()
    chosen = best_of(rows)
    rows = [row | {"chosen": row is chosen} for row in rows]
    if times is not None:
        rows = [row | {"latency_ms": times(row["sizes"])} for row in rows]
    last = stage_name(2, stage.options.method)
    winner = Checkpoint.open(place / chosen["name"] / last).load()
    for number, method in enumerate(("prune.minitron", stage.options.method), start=1):
        made = read_manifest(place / chosen["name"] / stage_name(number, method))
        winner.notes |= made.metrics["notes"]
    cut = place / chosen["name"] / stage_name(1, "prune.minitron")
    winner.beside[IMPORTANCE] = TensorFile.read(cut / IMPORTANCE)
    found = {"candidates": rows, "earlier_seconds": earlier}
    winner.notes["search"] = _summary(job, times) | found
    return winner


def _scores(job: Search, shapes: list[Shape]) -> Path | None:
    """The importance that all candidates are cut by, measured once; None where it cannot be shared.

    Windows of consecutive layers are ranked for one length, which is not that of all candidates.
    """
    file = job.place / IMPORTANCE
    if job.stage.options.contiguous:
        return None
    if not file.is_file():
        model = job.parent.load()
        each = [layers_to_go(model, shape) for shape in shapes]
        most = [max(stack) for stack in zip(*each, strict=True)]
        found = score(model, job.stage.options, job.work, most)
        found.file().write(job.work.scratch / IMPORTANCE)
        (job.work.scratch / IMPORTANCE).rename(file)
    return file


def _shapes(job: Search) -> tuple[list[Shape], Latencies | None]:
    """The shapes to train, and their latencies where these are the budget."""
    family, config, options = job.model.family, job.model.config, job.stage.options
    if options.latency is None:
        return planned_shapes(family, config, options), None
    name = stage_name(int(job.place.name), job.stage.method)
    times = open_latencies(job.place, name, job.parent, options, job.work)
    job.setting.screen.say(f"  measuring latency on {threads(options.threads)}")
    cells = grid(family, config, options)
    shapes = within_latency(job.model.sizes, cells, options, times)
    chosen = {int(job.place.name): shapes}
    rehearse(job.setting.profile, job.setting.source, chosen, job.setting.home)
    return shapes, times


def _claim(setting: Setting, place: Path, fingerprint: str) -> float:
    """Make the directory of the candidates; what is of no use here goes first.

    That is one of other settings, or of a stage that had landed, whose weights were deleted.

    Returns:
        Seconds that were spent on what is there.
    """
    record = place / _RECORD
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if place.is_dir() and (known.get("fingerprint") != fingerprint or known.get(_CLEARED)):
        setting.screen.say("  starting anew: what is there has other settings, or no weights")
        remove(place, setting.home / SCRATCH)
        known = {}
    place.mkdir(parents=True, exist_ok=True)
    return known.get("seconds", 0.0)


def _train_all(job: Search, shapes: list[Shape], scores: Path | None) -> list[dict[str, Any]]:
    counts, rows = Counts(job.model.family, job.model.config), []
    begin, made = time.perf_counter(), 0
    for number, shape in enumerate(shapes, start=1):
        name, parameters = candidate_name(number, shape), counts(shape)
        left = (time.perf_counter() - begin) / made * (len(shapes) - number + 1) if made else None
        job.setting.screen.say(
            f"  candidate {number} of {len(shapes)}: {name}, {millions(parameters)} parameters"
            + (f", about {clock(left)} left" if left is not None else "")
        )
        stages = candidate_stages(job.model.family, job.stage, shape, scores)
        job.note_time()
        made += _train(job, name, stages)
        size = parameters * itemsize(job.model.config)
        known = {"name": name, "sizes": shape, "parameters": parameters, "bytes": size}
        rows.append(known | outcome(job.place / name, job.stage.options.method))
        job.setting.log(f"candidate {rows[-1]}")
    return rows


def _train(job: Search, name: str, stages: tuple[Stage, ...]) -> bool:
    """Run a candidate unless it has been run, or has failed, before."""
    from compressor.run.pipeline import conduct  # which runs stages, of which a search is one

    home = job.place / name
    if (home / _DONE).is_file() or (home / FAILED).is_file():
        return False
    home.mkdir(exist_ok=True)
    try:
        conduct(_inside(job, home, stages), {"stages": []}, time.perf_counter())
    except (NotFinite, Refused) as error:
        replace_files(home, {FAILED: json.dumps({"what": error.what})})
    return True


def _inside(job: Search, home: Path, stages: tuple[Stage, ...]) -> Setting:
    """The setting of a candidate's run: another profile and home, the same corpus and teacher."""
    outer = job.setting
    profile = Profile(
        name=home.name,
        description=f"A candidate of {job.stage.method}.",
        stages=stages,
        teacher=outer.profile.teacher,
        data=outer.profile.data,
        seed=outer.profile.seed,
        dtype=outer.profile.dtype,
        keep="last",
    )
    cut, light = stages
    alone = replace(cut, options=replace(cut.options, scores=None))  # the search hands them over
    text = resolved_text(replace(profile, stages=(alone, light)))
    within = home.relative_to(outer.home).as_posix()
    return replace(
        outer,
        profile=replace(profile, text=text),
        source=job.parent,
        home=home,
        screen=_BarsOnly(outer.screen),
        note=lambda place: outer.note(f"{within}/{place}"),
        learns_from=outer.teacher_of(job.stage),
    )


@dataclass(frozen=True)
class _BarsOnly:
    """A screen on which a candidate shows its progress and does not speak."""

    screen: Screen

    def say(self, text: str) -> None:
        pass

    def progress(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return self.screen.progress(label, total)


def _summary(job: Search, times: Latencies | None) -> dict[str, Any]:
    options = job.stage.options
    budgets = {k: getattr(options, k) for k in ("parameters", "bytes", "latency")}
    return {
        "budget": {k: v for k, v in budgets.items() if v is not None},
        "tolerance": options.tolerance,
        "method": options.method,
        "steps": options.train.steps,
        "task": job.model.task,
        "latency": times and times.circumstances | {"original_ms": times(job.model.sizes)},
    }


def clear_candidates(place: Path, drop_weights: Callable[[Path], None]) -> None:
    """Delete the weights and the scratch of all candidates of a stage that has landed."""
    if not (place / _RECORD).is_file():  # the user may delete them
        return
    known = json.loads((place / _RECORD).read_text(encoding="utf-8"))
    replace_files(place, {_RECORD: json.dumps(known | {_CLEARED: True})})
    for home in place.glob("[0-9]*"):
        for stage in stage_directories(home):
            drop_weights(stage)
        shutil.rmtree(home / SCRATCH, ignore_errors=True)
