"""The identity of a stage: what would have to be the same for its result to be the same."""

import hashlib
import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from compressor.errors import CompressError
from compressor.model.importance_file import find_scores, scores_path
from compressor.model.manifest import Manifest, StageRecord, file_digest
from compressor.run.methods import load_method, method_hash
from compressor.run.profile import Stage


def fingerprint(record: StageRecord, dtype: str | None) -> str:
    """Hash of parent, method, options, seed, teacher, data, dtype, package version, method files.

    Speed and memory of the record do not count.
    """
    parts = {
        "parent": record.parent,
        "method": record.method,
        "options": record.options,
        "seed": record.seed,
        "teacher": record.teacher,
        "data": record.data["sha256"] if record.data else None,
        "dtype": dtype,
        "version": metadata.version("compress"),
        "file": _files(record),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def portable_options(stage: Stage, home: Path, made: Manifest | None = None) -> dict[str, Any]:
    """Options as a stage record holds them: the sha256 of a file in place of its path.

    Args:
        home: output directory of the run.
        made: what stands where the stage goes. A finished stage needs its file no more: where it
            is gone, the one that was read then is taken for it.

    Raises:
        CompressError: there is no such file.
    """
    found = stage.plain_options()
    if (path := found.get("scores")) is not None:
        before = made.stages[-1].options.get("scores") if made else None
        gone = before is not None and used_up(path, home)
        found["scores"] = before if gone else file_digest(scores_path(path))
    return found


def used_up(path: str, home: Path) -> bool:
    """Whether there are no scores at `path` any more, and the run in `home` was told that path."""
    profile = home / "profile.yaml"
    if find_scores(path) is not None or not profile.is_file():
        return False
    told = yaml.safe_load(profile.read_text(encoding="utf-8"))
    chains = [told["stages"], *(told.get("baselines") or {}).values()]
    return any(o.get("scores") == path for chain in chains for s in chain for o in s.values())


def _files(record: StageRecord) -> str | list[str]:
    """Hash of the method's files, and of those of the methods that a search's candidates use."""
    own = method_hash(load_method(record.method))
    if not record.method.startswith("search."):
        return own
    used = ("prune.minitron", record.options["method"])
    return [own, *(method_hash(load_method(method)) for method in used)]


def with_fingerprint(record: StageRecord, dtype: str | None = None) -> StageRecord:
    """The same record with its fingerprint filled in."""
    return replace(record, fingerprint=fingerprint(record, dtype))


def refuse_change(number: int, found: StageRecord, wanted: StageRecord) -> None:
    """Refuse a finished stage that no longer matches the profile.

    Raises:
        CompressError: names what changed and how to redo it.
    """
    changed = _difference(found, wanted)
    raise CompressError(
        f"stage {number} was made with other settings: {changed}",
        f"add --redo {number} to make it and all after it again, or give another --out",
    )


def _difference(found: StageRecord, wanted: StageRecord) -> str:
    if found.method != wanted.method:
        return f"method was {found.method}, now {wanted.method}"
    old, new = _flat(found.options), _flat(wanted.options)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key} was {old.get(key)}, now {new.get(key)}"
    if found.seed != wanted.seed:
        return f"seed was {found.seed}, now {wanted.seed}"
    if found.data != wanted.data:
        return "the data has another content"
    if found.teacher != wanted.teacher:
        return "another teacher"
    if found.parent != wanted.parent:
        return "an earlier stage changed"
    return f"another dtype, or another version of compress or of {wanted.method}"


def _flat(options: dict, prefix: str = "") -> dict:
    found: dict = {}
    for key, value in options.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
