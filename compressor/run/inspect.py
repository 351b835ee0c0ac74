"""`compress inspect`: what a directory holds, from its own files."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressor.engines import GGUF, GRAPHS
from compressor.model.checkpoint import load_directory
from compressor.model.count import count_nonzero, count_parameters
from compressor.model.families import find_family
from compressor.model.manifest import NAME, Manifest, read_manifest
from compressor.model.shapes import config_of
from compressor.model.sources import deployed_bytes, read_config, resolve
from compressor.run.candidates import refuse_run
from compressor.run.inspect_importance import inspect_importance
from compressor.run.parts import KEY as PARTS


def inspect(path: str, importance: bool = False) -> dict[str, Any]:
    """Describe a checkpoint or artefact in the `inspect --json` form.

    Args:
        path: a directory, a hub id or package:NAME.
        importance: give the scores that prune.minitron left in the directory (or a file of
            them) instead; see inspect_importance.py.
    """
    if importance:
        return inspect_importance(str(path))
    refuse_run(str(path), "inspect")
    source = resolve(str(path))
    raw = read_config(source.path)
    family = find_family(raw["model_type"])
    manifest = read_manifest(source.path) if (source.path / NAME).is_file() else None
    exported = manifest is not None and manifest.engine in (*GRAPHS, *GGUF)
    found = _artifact(manifest) if exported and manifest else _weights(source.path)
    return {
        "path": str(path),
        "kind": manifest.kind if manifest else "checkpoint",
        "engine": manifest.engine if manifest else None,
        "family": family.model_type,
        **found,
        "bytes": deployed_bytes(source.path),
        "dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32",
        "sizes": family.read_sizes(config_of(raw)),
        "formats": {k: asdict(v) for k, v in manifest.formats.items()} if manifest else {},
        "stages": [asdict(s) for s in manifest.stages] if manifest else [],
        "metrics": _metrics(manifest) if manifest else {},
        "complete": manifest is not None,
    }


def _metrics(manifest: Manifest) -> dict[str, Any]:
    """Those that a reader wants: checksums of parts are for verify."""
    return {key: value for key, value in manifest.metrics.items() if key != PARTS}


def _weights(path: Path) -> dict[str, Any]:
    module = load_directory(path).module
    return {
        "parameters": count_parameters(module),
        "nonzero_parameters": count_nonzero(module),
    }


def _artifact(manifest: Manifest) -> dict[str, Any]:
    keys = ("parameters", "nonzero_parameters")
    return {key: manifest.metrics.get(key) for key in keys}
