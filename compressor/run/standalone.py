"""`compress export`: export one finished checkpoint, with the same proof as inside a run."""

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from compressor.errors import CompressError
from compressor.model.manifest import Artifact, StageRecord, write_manifest
from compressor.options import nearest
from compressor.run.candidates import refuse_run
from compressor.run.export import export_into
from compressor.run.fingerprint import with_fingerprint
from compressor.run.layout import landing, locked, rejecting
from compressor.run.machine import peak_memory
from compressor.run.make_options import make_options
from compressor.run.methods import load_method, method_names
from compressor.run.overrides import read_value
from compressor.run.parts import sealed
from compressor.run.profile import Stage
from compressor.run.setting import open_source
from compressor.run.yaml_lines import Document


def export_checkpoint(
    checkpoint: str, to: str, out: str | Path, set: Sequence[str] = ()
) -> Artifact:
    """Export a checkpoint directory, hub id or package into a new directory `out`.

    Args:
        checkpoint: what to export; its own formats decide the precision.
        to: onnx, safetensors, ...
        out: directory that must not exist yet.
        set: "KEY=VALUE" options of the exporter.

    Raises:
        CompressError: unknown target, directory in use, checkpoint damaged.
        Refused: the engine that serves the file disagrees with torch.
    """
    targets = method_names("export")
    if to not in targets:
        raise CompressError(
            f"unknown target '{to}'{nearest(to, targets)}", f"--to one of {', '.join(targets)}"
        )
    target = Path(out)
    if target.exists():
        raise CompressError(f"'{out}' exists already", "give a new --out directory")
    refuse_run(checkpoint, "export")
    stage = _stage(to, set)
    parent = open_source(checkpoint)
    # of a fixed name: what a kill left there is emptied by the next export, and two cannot meet
    scratch = target.parent / f".compress-{target.name}"
    with ExitStack() as stack:
        stack.enter_context(locked(scratch))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        with landing(target, scratch) as partial, rejecting(partial, target):
            start = time.perf_counter()
            manifest = export_into(partial, stage, parent, floor={}, work=None)
            record = StageRecord(
                method=stage.method,
                options=stage.plain_options(),
                seed=0,
                teacher=None,
                data=None,
                seconds=time.perf_counter() - start,
                peak_memory_bytes=peak_memory(),
                parent=parent.manifest.fingerprint,
                fingerprint="",
            )
            stages = [*parent.manifest.stages, with_fingerprint(record)]
            manifest = sealed(partial, replace(manifest, stages=stages))
            write_manifest(partial, manifest)
    return Artifact(target, manifest, str(manifest.engine))


def _stage(to: str, overrides: Sequence[str]) -> Stage:
    given = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise CompressError(f"--set '{text}' is no KEY=VALUE", "--set opset=20")
        given[key] = read_value(text, value)
    method = f"export.{to}"
    document = Document(given, {}, "--set")
    options = make_options(load_method(method).Options, given, document, (method,))
    return Stage("export", to, options)
