"""manifest.json: what a directory holds, how it came to be, and whether it is complete.

It is written last, so its presence means the directory is complete. Keys are fixed; see
docs/formats.md. Formats are keyed by module name, never by tensor or file name.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compressor.errors import CompressError

NAME = "manifest.json"
VERSION = 1
_PATTERN = r"unstructured|[1-9]\d*:[1-9]\d*"


@dataclass(frozen=True)
class WeightFormat:
    """How the weight of one module is stored. A dense float module has no format."""

    pattern: str | None = None  # null | unstructured | "N:M"
    sparsity: float = 0.0
    bits: int | None = None
    group: int | None = None  # inputs per scale; null means one scale per output channel
    symmetric: bool = True  # no zero points, or no offsets beside a codebook
    scale_dtype: str = "float16"
    # null | {bits, per: tensor|token, dynamic [, scaled: inputs are multiplied before]}
    activation: dict[str, Any] | None = None
    codebook: str | None = None  # null | nf4 | learned
    points: int | None = None  # of a learned codebook; bits is what one of their codes takes
    flat: bool = False  # codebooks: a group runs over the flattened weight, not along inputs
    side_rank: int | None = None


def quantized(formats: Mapping[str, WeightFormat]) -> bool:
    """Whether any weight is stored as codes; sparse float weights are not."""
    return any(form.bits is not None for form in formats.values())


@dataclass(frozen=True)
class StageRecord:
    """One stage of the chain: enough to repeat it and to know whether it must be repeated."""

    method: str
    options: dict[str, Any]
    seed: int
    teacher: str | None
    data: dict[str, str] | None  # {name, sha256}
    seconds: float
    peak_memory_bytes: int
    parent: str  # fingerprint of the checkpoint this stage started from
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    kind: str  # checkpoint | artifact
    family: str
    base_model: dict[str, Any]  # {id, sha256, license}
    engine: str | None = None
    stages: list[StageRecord] = field(default_factory=list)
    formats: dict[str, WeightFormat] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name: {sha256, bytes}
    packages: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)  # {cpu, threads, memory_bytes}
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        """Identity of these weights: the last stage's fingerprint, or the source's sha256."""
        return self.stages[-1].fingerprint if self.stages else self.base_model["sha256"]


@dataclass(frozen=True)
class Artifact:
    """An exported directory and the engine that serves it; nobody sniffs files."""

    path: Path
    manifest: Manifest
    engine: str


def _impossible(form: WeightFormat) -> str:
    """The first field with a value that nothing of ours writes; "" when all are sound."""
    counts = (form.bits, form.group, form.side_rank, form.points)
    if not all(n is None or (type(n) is int and n > 0) for n in counts):
        return "bits, group, points or side_rank"
    learned, flat = form.codebook == "learned", form.flat
    sound = {
        "pattern": form.pattern is None or re.fullmatch(_PATTERN, str(form.pattern)),
        "bits": form.bits is None or form.bits <= 8,
        "symmetric": isinstance(form.symmetric, bool),
        "codebook": form.codebook in (None, "nf4", "learned"),
        "points": (form.points is not None) == learned,
        "flat": not flat or (flat is True and form.codebook is not None and form.group is not None),
        "activation": form.activation is None or _rounds_inputs(form, form.activation),
    }
    return next((field for field, fine in sound.items() if not fine), "")


def _rounds_inputs(form: WeightFormat, stated: Any) -> bool:
    """Whether a Linear of this format can round its inputs as stated (layers.QuantLinear)."""
    if not isinstance(stated, dict) or not {"bits", "per", "dynamic"} <= stated.keys():
        return False
    whole = form.bits == 8 and form.group is None and form.symmetric and form.codebook is None
    per = ("tensor", "token") if stated["dynamic"] else ("tensor",)
    return whole and stated["bits"] == 8 and stated["per"] in per


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def wrong_size(file: Path, stated: dict[str, Any]) -> str:
    """How a file's size differs from its entry in `files`; "" where it does not."""
    if not file.is_file():
        return "the file is missing"
    size = file.stat().st_size
    return "" if size == stated["bytes"] else f"{size:,} bytes instead of {stated['bytes']:,}"


def altered(file: Path, stated: dict[str, Any]) -> str:
    """How a file differs from its entry in `files`; "" where it does not."""
    if problem := wrong_size(file, stated):
        return problem
    return "" if file_digest(file) == stated["sha256"] else "its content changed (sha256)"


def list_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Digest and size of every file below `directory` except the manifest itself."""
    found = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != NAME)
    return {
        p.relative_to(directory).as_posix(): {"sha256": file_digest(p), "bytes": p.stat().st_size}
        for p in found
    }


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json through a temporary file, flushed to disk before the rename."""
    temporary = directory / f"{NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(asdict(manifest), stream, indent=1, sort_keys=False)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(directory / NAME)


def read_manifest(directory: Path) -> Manifest:
    """Read manifest.json of a complete directory.

    Raises:
        CompressError: it is absent, no JSON, of another version, or names a format that cannot be.
    """
    path = directory / NAME
    if not path.is_file():
        raise CompressError(
            f"{directory} has no {NAME}", "name a directory that `compress run` wrote"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("version") != VERSION:
            raise CompressError(
                f"{path} is of version {raw.get('version')}, this program reads {VERSION}",
                "run the version of compress that wrote it",
            )
        raw["stages"] = [StageRecord(**s) for s in raw["stages"]]
        raw["formats"] = {k: WeightFormat(**v) for k, v in raw["formats"].items()}
        manifest = Manifest(**raw)
        for name, form in manifest.formats.items():
            if field := _impossible(form):
                raise ValueError(f"{field} of '{name}'")
        if not all({"sha256", "bytes"} <= entry.keys() for entry in manifest.files.values()):
            raise ValueError("files without sha256 or bytes")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(
            f"{path} is damaged ({error})", "delete the directory and run again"
        ) from error
