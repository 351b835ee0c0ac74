"""`compress verify`: prove a finished directory again, without its parent."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compressor.engines import GGUF, GRAPHS, installed, serving
from compressor.engines.gguf import GgufEngine
from compressor.errors import CompressError, first_line
from compressor.export.gguf_names import library
from compressor.model.checkpoint import load_directory
from compressor.model.manifest import Manifest, altered, read_manifest
from compressor.model.model import Model
from compressor.model.sparse import broken_promise, patterns_text
from compressor.run.candidates import engine_and_place, refuse_run
from compressor.run.forget import WEIGHTS_REMOVED
from compressor.run.gate import open_and_check
from compressor.run.parts import KEY as PARTS
from compressor.run.parts import changed

Check = dict[str, Any]


def verify(path: str | Path) -> dict[str, Any]:
    """Check every digest, load the directory in its engine and repeat the probe.

    Args:
        path: a directory; another engine that is to run it may stand in front: openvino:DIR.

    Returns:
        {ok, checks: [{name, ok, detail}]}, the `verify --json` form.

    Raises:
        CompressError: the directory has no readable manifest, or that engine cannot run it.
    """
    asked, place = engine_and_place(str(path))
    directory = Path(place).expanduser()
    refuse_run(place, "verify")
    manifest = read_manifest(directory)
    if not manifest.files and not manifest.stages:
        raise CompressError(
            f"'{path}' only says what a run started from; it holds no weights",
            "verify a stage of the run, e.g. 01-...",
        )
    if asked is not None:
        serving(directory, asked)
    if manifest.engine in GGUF:
        library()  # whoever lacks it must install it: the artefact is not at fault
    checks = list(_files(directory, manifest))
    if manifest.metrics.get(WEIGHTS_REMOVED):
        checks.append({"name": "probe", "ok": True, "detail": "weights removed by keep: last"})
    else:
        checks.append(_probe(directory, manifest, asked))
        checks.extend(_formats(directory, manifest))
        checks.extend(_sparsity(directory, manifest))
    return {"ok": all(c["ok"] for c in checks), "checks": checks}


def _files(directory: Path, manifest: Manifest) -> Iterator[Check]:
    for name, stated in manifest.files.items():
        file = directory / name
        if problem := altered(file, stated):
            inside = changed(directory, name, manifest.metrics.get(PARTS, {}))
            detail = f"{problem}: {inside}" if inside else problem
            yield {"name": name, "ok": False, "detail": detail}
        else:
            yield {"name": name, "ok": True, "detail": "unchanged"}


def _formats(directory: Path, manifest: Manifest) -> Iterator[Check]:
    """Whether weights are as the manifest says, where the serving engine does not read that."""
    if manifest.engine != "transformers":
        return
    detail = ""
    try:
        load_directory(directory, manifest.formats)
    except CompressError as error:
        detail = error.what
    yield {"name": "formats", "ok": not detail, "detail": detail or "those of the manifest"}


def _sparsity(directory: Path, manifest: Manifest) -> Iterator[Check]:
    """The zeros of a sparse checkpoint or safetensors artefact, layer by layer."""
    promised = patterns_text(manifest.formats)
    if not promised:
        return
    if manifest.engine in GRAPHS:
        held = "zeros of ONNX files are not counted; digests and probe hold them"
        yield {"name": "sparsity", "ok": True, "detail": held}
        return
    try:
        broken = broken_promise(_model(directory, manifest), manifest.formats)
    except CompressError as error:
        broken = error.what
    yield {"name": "sparsity", "ok": not broken, "detail": broken or promised}


def _model(directory: Path, manifest: Manifest) -> Model:
    """The model of a directory in PyTorch."""
    if manifest.engine in GGUF:
        return GgufEngine(directory).model
    return load_directory(directory, manifest.formats)


def _probe(directory: Path, manifest: Manifest, asked: str | None) -> Check:
    """Load in the serving engine, or the one asked for, and compare with the probe's outputs."""
    name, remark = asked or manifest.engine or "torch", ""
    if not installed(name):  # then the artefact is not at fault, and another engine reads it
        name, lacks = {
            "llama.cpp": ("gguf", "read back only, llama-cpp-python"),
            "onnxruntime-genai": ("onnxruntime", "in ONNX Runtime, onnxruntime-genai"),
        }.get(name, (name, name))
        remark = f"; {lacks} is not installed here"
    try:
        found = open_and_check(name, directory, manifest.formats.values(), manifest.metrics)
    except CompressError as error:
        return {"name": "probe", "ok": False, "detail": error.what}
    except Exception as error:  # damage that only shows when the model runs, of whatever kind
        return {"name": "probe", "ok": False, "detail": f"it does not run: {first_line(error)}"}
    worst = max(found.errors.values())
    if name == "llama.cpp":
        served = max(found.served.errors.values())
        remark = f"; in llama.cpp {served:.1e}, allowed {found.served_tolerance:.0e}"
    agrees = f"relative error {worst:.1e}, allowed {found.tolerance:.0e}{remark}"
    if greedy := found.tightest.greedy:
        agrees += f"; {greedy.equal} of {greedy.tokens} greedy tokens"
    return {"name": "probe", "ok": found.ok, "detail": found.failure or agrees}
