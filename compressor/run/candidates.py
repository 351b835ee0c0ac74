"""From what a user typed to candidates with short names; the plausible mistakes are explained."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.engines import Engine, open_engine_of, serving
from compressor.errors import CompressError
from compressor.model.manifest import NAME as MANIFEST
from compressor.model.manifest import read_manifest
from compressor.model.sources import resolve
from compressor.run.layout import REASON, SOURCE, stage_directories

# what stands in front of a directory, and the engine it asks for
PREFIXES = {name: name for name in ("onnxruntime", "openvino", "gguf", "llama.cpp")}
PREFIXES["genai"] = "onnxruntime-genai"


@dataclass(frozen=True)
class Candidate:
    """A directory to measure, what tables call it, and what runs it.

    Attributes:
        asked: name of the engine that is to run it; None for the one that its manifest names.
        device: see `open_engine_of`.
    """

    name: str
    path: Path
    asked: str | None = None
    device: str = "cpu"

    @property
    def engine(self) -> str:
        """Name of the engine that runs it; raises as `serving` does."""
        return serving(self.path, self.asked)

    def open(self, threads: int | None = None) -> Engine:
        """Open it; raises as `open_engine_of` does."""
        return open_engine_of(self.engine, self.path, threads, device=self.device)


def find_candidates(names: Sequence[str], device: str = "cpu") -> list[Candidate]:
    """Resolve directories, hub ids and package:NAME[/subdir] in the order given.

    An exported directory may have the engine that is to run it in front: openvino:DIR.

    Raises:
        CompressError: nothing is found under a name, it is the directory of a whole run, or one
            that was never completed.
    """
    found = []
    for name, short in zip(names, short_names(names), strict=True):
        asked, place = engine_and_place(name)
        refuse_run(place, "bench")
        found.append(Candidate(short, resolve(place).path, asked, device))
    return found


def engine_and_place(name: str) -> tuple[str | None, str]:
    """openvino:DIR is (openvino, DIR); anything without one of PREFIXES is itself."""
    prefix, colon, place = name.partition(":")
    known = colon and prefix in PREFIXES and not Path(name).is_dir()
    return (PREFIXES[prefix], place) if known else (None, name)


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of every name, with as many parts before it as make it unlike the others.

    A stage of a run keeps the name of its run, and the same thing given twice gets a number. An
    engine that was named in front comes behind.
    """
    parts = [_parts(engine_and_place(name)[1]) for name in names]
    shown = []
    for name, own in zip(names, parts, strict=True):
        engine = f", {name.partition(':')[0]}" if engine_and_place(name)[0] else ""
        others = [other for other in parts if other != own]
        count = 2 if own[-1][:2].isdigit() and len(own) > 1 else 1
        while count < len(own) and any(other[-count:] == own[-count:] for other in others):
            count += 1
        shown.append("/".join(own[-count:]) + engine)
    return [
        text if shown.count(text) == 1 else f"{text} ({shown[: i + 1].count(text)})"
        for i, text in enumerate(shown)
    ]


def _parts(name: str) -> tuple[str, ...]:
    if not name.startswith("package:"):
        name = os.path.abspath(Path(name).expanduser()) if Path(name).is_dir() else name
    return tuple(part for part in name.removeprefix("package:").split("/") if part)


def _to_export(stages: list[str]) -> str:
    """What to type to export the last checkpoint of a run."""
    kinds = {place: read_manifest(Path(place).expanduser()).kind for place in stages}
    last = next((place for place in reversed(stages) if kinds[place] == "checkpoint"), "CHECKPOINT")
    return f"compress export {last} --to TARGET --out DIR"


def refuse_run(name: str, command: str) -> None:
    """Refuse the directory of a whole run, which holds checkpoints and is none.

    Raises:
        CompressError: names what is inside, and the command for the last of it.
    """
    path = Path(name).expanduser()
    if command != "inspect" and (path / REASON).is_file():
        raise CompressError(
            f"'{name}' was refused: {(path / REASON).read_text(encoding='utf-8').strip()}",
            "make it again; this one is kept for looking at, e.g. with compress inspect",
        )
    if (path / SOURCE).is_dir() or (path / "profile.yaml").is_file():
        found = [str(Path(name) / d.name) for d in stage_directories(path)]
        if not found:
            raise CompressError(
                f"'{name}' is the directory of a run that has finished no stage yet",
                "finish it with compress run, or name a checkpoint",
            )
        inside = ", ".join(Path(f).name for f in found)
        hint = f"compress {command} {found[-1]}"
        if command == "export":
            hint = _to_export(found)
        raise CompressError(
            f"'{name}' is the directory of a whole run; it holds {inside}",
            hint,
        )
    if (path / "model.onnx").is_file() and not (path / MANIFEST).is_file():
        raise CompressError(
            f"'{name}' has a model.onnx and no {MANIFEST}: no finished export of compress",
            "make it with compress export CHECKPOINT --to onnx --out DIR",
        )
