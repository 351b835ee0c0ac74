"""Gather what the report shows: everything comes from manifests, so a resumed run reports all."""

from typing import Any

from compressor.model.count import count_embedding_parameters, count_parameters
from compressor.model.manifest import Manifest, read_manifest
from compressor.model.probe import NAME as PROBE
from compressor.model.sparse import patterns_text
from compressor.run.card_usage import usage
from compressor.run.layout import stage_name
from compressor.run.machine import machine, packages
from compressor.run.measuring import own_data
from compressor.run.rehearse import empty
from compressor.run.report_sparse import zeros_sentence
from compressor.run.setting import Setting

_WEIGHTS = (".safetensors", ".onnx", ".onnx.data", ".gguf")
NOT_DEPLOYED = (PROBE, "README.md")  # so that a stage has the size that bench gives it


def summary(
    setting: Setting, plan: dict[str, Any], bench: dict[str, Any] | None, seconds: float
) -> dict[str, Any]:
    """The content of report.json."""
    names = [stage_name(n, s.method) for n, s in enumerate(setting.profile.stages, start=1)]
    manifests = {name: read_manifest(setting.home / name) for name in names}
    planned = {stage["name"]: stage for stage in plan["stages"]}
    exports = {name: m for name, m in manifests.items() if m.kind == "artifact"}
    return {
        "name": setting.profile.name,
        "description": setting.profile.description,
        "profile": setting.profile.text,
        "model": _model(setting),
        "machine": machine(),
        "packages": packages(),
        "seed": setting.profile.seed,
        "seconds": seconds,
        "stages": [_stage(name, m, planned.get(name)) for name, m in manifests.items()],
        "bench": bench,
        "gates": [_gate(name, m) for name, m in exports.items()],
        "artifacts": [_artifact(setting, name, m) for name, m in exports.items()],
        "zeros": zeros_sentence(manifests),
        "domain": _domain(setting, bench),
    }


def _model(setting: Setting) -> dict[str, Any]:
    module = empty(setting.source.path).module
    return {
        "id": setting.source.manifest.base_model["id"],
        "family": setting.source.manifest.family,
        "parameters": count_parameters(module),
        "embedding_parameters": count_embedding_parameters(module),
    }


def _stage(name: str, manifest: Manifest, planned: dict[str, Any] | None) -> dict[str, Any]:
    record = manifest.stages[-1]
    deployed = {n: f["bytes"] for n, f in manifest.files.items() if n not in NOT_DEPLOYED}
    weights = sum(size for n, size in deployed.items() if n.endswith(_WEIGHTS))
    return {
        "name": name,
        "method": record.method,
        "seconds": record.seconds,
        "peak_memory_bytes": record.peak_memory_bytes,
        "parameters": manifest.metrics.get("parameters"),
        "nonzero_parameters": manifest.metrics.get("nonzero_parameters"),
        "patterns": patterns_text(manifest.formats),
        "bytes": sum(deployed.values()),
        "weight_bytes": weights or None,  # none where they were removed
        "planned": planned,
        "notes": manifest.metrics.get("notes", {}),
    }


def _gate(name: str, manifest: Manifest) -> dict[str, Any]:
    return {"name": name, "ok": True} | {
        key: manifest.metrics[key] for key in ("agreement", "tolerance", "differences", "fidelity")
    }


def _artifact(setting: Setting, name: str, manifest: Manifest) -> dict[str, Any]:
    engine = str(manifest.engine)
    return {"name": name, "engine": engine, "usage": usage(manifest, setting.task)}


def _domain(setting: Setting, bench: dict[str, Any] | None) -> str:
    """Where the quality comes from, in a sentence; "" where data was given and none measured."""
    if setting.corpus is None:
        return "No data was given, so no quality was measured."
    if bench is None or not any(candidate["quality"] for candidate in bench["candidates"]):
        return ""
    own = own_data(bench["measures"])
    if "heldout" in setting.profile.data:
        named = "Quality is measured on the held-out documents that the profile names."
        return f"{named} {own}".strip()
    found = (
        f"Quality is measured on documents of {setting.corpus.name} that were held out of training "
        "and never used to choose anything. They are of the same domain as the training text, so "
        "expect less on other text."
    )
    return f"{found} {own}".strip()
