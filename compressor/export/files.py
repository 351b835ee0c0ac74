"""What every exported directory holds beside its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.engines.generate import follow
from compressor.engines.torch import GENERATES, TorchEngine
from compressor.model.forward import outputs
from compressor.model.manifest import Artifact, Manifest, WeightFormat
from compressor.model.model import Model, Pooling
from compressor.model.pooling import FLAGS
from compressor.model.probe import SHAPES, probe_batches, write_probe
from compressor.training.reading import most_tokens

_GREEDY = 16  # tokens of the continuation in a probe
_PROMPT = SHAPES[0][1] + 2  # tokens in front of it, at most


def artifact(
    model: Model,
    out: Path,
    engine: str,
    formats: Mapping[str, WeightFormat],
    metrics: dict[str, Any] | None = None,
) -> Artifact:
    """What a finished directory is: of the model's family, served by `engine`."""
    manifest = Manifest(
        kind="artifact",
        family=model.family.model_type,
        base_model={},
        engine=engine,
        formats=dict(formats),
        metrics=metrics or {},
    )
    return Artifact(out, manifest, engine)


def write_probe_of(model: Model, out: Path) -> None:
    """Write what a model gives for the probe's batches and, if it writes text, goes on to say.

    That continuation is found with the cache, so an engine that repeats it proves its own.
    """
    exchanges = [(batch, outputs(model, batch)) for batch in probe_batches(model)]
    said = None
    if model.task in GENERATES:
        prompt = exchanges[0][0]
        room = (most_tokens(model.config) or _GREEDY + _PROMPT) - _PROMPT
        said = follow(TorchEngine.of(model, out), prompt, min(_GREEDY, room))
    write_probe(out, exchanges, said)


def write_side_files(model: Model, out: Path) -> None:
    """Write config.json with the model's present sizes, the tokenizer and the pooling files.

    Pooling files that are already there are left alone.
    """
    model.config.architectures = [type(model.module).__name__]
    model.config.save_pretrained(out)
    if model.processor is not None:
        model.processor.save_pretrained(out)
    if model.pooling is not None and not (out / "modules.json").exists():
        _write_pooling(model.pooling, model.sizes["hidden"], out)


def _write_pooling(pooling: Pooling, hidden: int, out: Path) -> None:
    """The files by which sentence-transformers knows how to pool."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if pooling.normalize else [])]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    stated = {key: mode == pooling.mode for mode, key in FLAGS.items()}
    stated = {"word_embedding_dimension": hidden, **stated}
    (out / "1_Pooling").mkdir()
    (out / "modules.json").write_text(json.dumps(modules, indent=2), encoding="utf-8")
    (out / "1_Pooling" / "config.json").write_text(json.dumps(stated, indent=2), encoding="utf-8")
