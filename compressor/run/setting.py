"""What the stages of one run share, and the workbench each of them is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError
from compressor.model.checkpoint import Checkpoint, load_processor, read_task
from compressor.model.families import find_family
from compressor.model.manifest import NAME as MANIFEST
from compressor.model.manifest import Manifest, read_manifest
from compressor.model.model import Model
from compressor.model.sources import describe_source, read_config, resolve
from compressor.run.layout import SCRATCH, stage_directories
from compressor.run.machine import machine, packages
from compressor.run.profile import Profile, Stage
from compressor.screen import Screen
from compressor.training.data import Corpus, DataSpec, load_corpus, make_batches
from compressor.training.reading import Reading, reading_of
from compressor.training.workbench import Batch, Workbench


@dataclass(frozen=True)
class Setting:
    """One run: its profile, its source and where its stages go."""

    profile: Profile
    source: Checkpoint  # the user's folder, with the manifest of 00-source
    home: Path
    screen: Screen
    log: Callable[[str], None]
    note: Callable[[str], None] = lambda place: None  # what is being done, into the lock
    learns_from: Checkpoint | None = None  # the teacher of every stage of a search's candidate
    _teachers: dict[str, Checkpoint] = field(default_factory=dict, repr=False)
    _corpora: list[Corpus] = field(default_factory=list, repr=False)  # the one, once it is read

    @cached_property
    def processor(self) -> Any:
        """The tokenizer of the source, or None."""
        return load_processor(self.source.path)

    @cached_property
    def task(self) -> str:
        """Task of the source model, from its architecture's name."""
        return read_task(self.source.path)

    @cached_property
    def reading(self) -> Reading:
        """What the source model reads beside tokens: pairs, images, sound."""
        return reading_of(self.source.path)

    @property
    def corpus(self) -> Corpus | None:
        """The data of the profile, split by document; None when the profile names none.

        The candidates of a search share it with the run they are part of.
        """
        data = self.profile.data
        if not data:
            return None
        if not self._corpora:
            reading = self.reading
            corpus = load_corpus(DataSpec(**data), self.task, reading.kind, reading.classes)
            corpus.check(reading)
            self._corpora.append(corpus)
        return self._corpora[0]

    @property
    def readable(self) -> bool:
        """Whether rows can be made: only images need no tokenizer."""
        return self.processor is not None or self.reading.kind == "images"

    def refuse_unreadable(self, who: str) -> None:
        """Refuse to read rows where there are none, on behalf of a stage.

        Raises:
            CompressError: the profile names no data, or the source has no tokenizer.
        """
        if self.corpus is None:
            raise CompressError(
                f"{who} needs data and the profile names none", "--data FILE, or data: in YAML"
            )
        if not self.readable:
            raise CompressError(
                f"'{self.source.manifest.base_model['id']}' has no tokenizer",
                "add tokenizer.json and tokenizer_config.json to it",
            )

    def row_tokens(self, length: int) -> float:
        """Positions of a training row on average: encoders read paragraphs, decoders windows."""
        if self.corpus is None or not self.readable or self.task == "causal-lm":
            return float(length)
        rows = self.corpus.rows("train", self.processor, length, self.reading)
        return float(rows.lengths.mean())

    @property
    def data_record(self) -> dict[str, str] | None:
        """{name, sha256} of the data, for stage records."""
        return {"name": self.corpus.name, "sha256": self.corpus.sha256} if self.corpus else None

    def scratch(self, target: Path, fingerprint: str) -> Path:
        """Private folder of the stage that will become `target` with these very settings."""
        name = target.relative_to(self.home).as_posix().replace("/", "-").replace(".", "-")
        return self.home / SCRATCH / f"{name}.{fingerprint[:12]}"

    def seed_of(self, stage: Stage) -> int:
        """The stage's own seed, or the profile's."""
        return self.profile.seed if stage.seed is None else stage.seed

    def teacher_of(self, stage: Stage) -> Checkpoint:
        """The checkpoint a stage learns from: input, stage:N, a path or a hub id."""
        if self.learns_from is not None:
            return self.learns_from
        name = stage.teacher or self.profile.teacher
        if name == "input":
            return self.source
        if name.startswith("stage:"):
            return self._stage_checkpoint(name.removeprefix("stage:"))
        if name not in self._teachers:
            self._teachers[name] = open_source(name)
        return self._teachers[name]

    def _stage_checkpoint(self, number: str) -> Checkpoint:
        found = [d for d in stage_directories(self.home) if d.name.startswith(f"{number:0>2}-")]
        if not found:
            raise CompressError(
                f"teacher 'stage:{number}' is no finished stage of this run",
                "name an earlier stage, e.g. teacher: stage:1",
            )
        return Checkpoint.open(found[0])

    def workbench(self, stage: Stage, scratch: Path) -> Workbench:
        """The surroundings of a stage; data and teacher are loaded when first asked for."""
        return self._workbench(scratch, self.seed_of(stage), lambda: self.teacher_of(stage))

    def measuring(self) -> Workbench:
        """The surroundings of the measures that follow a run."""
        return self._workbench(
            self.home / SCRATCH / "measures", self.profile.seed, lambda: self.source
        )

    def _workbench(self, scratch: Path, seed: int, teacher: Callable[[], Checkpoint]) -> Workbench:
        scratch.mkdir(parents=True, exist_ok=True)

        def batches(split: str, n: int | None, **shape: Any) -> Sequence[Batch]:
            self.refuse_unreadable("this run")
            assert self.corpus is not None
            given = {"task": self.task, "seed": seed, "reading": self.reading}
            return make_batches(self.corpus, self.processor, split, n, **given, **shape)

        return Workbench(
            seed=seed,
            device=torch.device("cpu"),
            scratch=scratch,
            _screen=self.screen,
            _log=self.log,
            _batches=batches,
            _teacher=lambda: frozen(teacher().load()),
            _reference=lambda: TorchEngine.of(self.source.load(), self.source.path),
        )


def frozen(model: Model) -> Model:
    """Switch off the gradients of a model."""
    model.module.requires_grad_(False)
    return model


def open_source(name: str) -> Checkpoint:
    """Resolve a model name: a plain checkpoint is described, one of ours brings its manifest.

    Raises:
        CompressError: not found, no checkpoint, unknown architecture, damaged weights.
    """
    source = resolve(name)
    family = find_family(read_config(source.path)["model_type"])
    if (source.path / MANIFEST).is_file():
        manifest = read_manifest(source.path)
        # packed weights are the checkpoint itself, bit for bit; other exports have lost something
        if manifest.kind == "artifact" and "packed" not in manifest.metrics:
            raise CompressError(
                f"'{name}' is an artefact already", "name the checkpoint it was made from"
            )
        return Checkpoint(source.path, manifest)
    manifest = Manifest(
        kind="checkpoint",
        family=family.model_type,
        base_model=describe_source(source),
        packages=packages(),
        machine=machine(),
    )
    return Checkpoint(source.path, manifest)
