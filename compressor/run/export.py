"""Export with proof: write, load in the serving engine, compare, describe, or refuse."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.engines import Engine, open_engine_of
from compressor.engines.llama_cpp import LlamaCppEngine
from compressor.errors import CompressError, Refused
from compressor.export.holders import naming_holders
from compressor.measure import fidelity
from compressor.model.checkpoint import Checkpoint
from compressor.model.count import count_nonzero, count_parameters
from compressor.model.kv_cache import has_scales
from compressor.model.manifest import Artifact, Manifest, altered
from compressor.model.model import Model
from compressor.model.side_files import copy_side_files
from compressor.run.card import CARD, SIDE_LOSSES, model_card
from compressor.run.gate import check_agreement
from compressor.run.llama_text import compare_text
from compressor.run.methods import load_method
from compressor.run.profile import Stage
from compressor.run.rehearse_formats import refuse_cached
from compressor.training.workbench import Workbench


def export_into(
    directory: Path,
    stage: Stage,
    parent: Checkpoint,
    floor: dict[str, float],
    work: Workbench | None,
) -> Manifest:
    """Export a checkpoint into an existing empty directory and prove that it serves.

    Args:
        directory: where the artefact is written; the caller renames it when all is well.
        stage: the export stage.
        parent: the checkpoint to export.
        floor: lowest fidelity to the float model that is acceptable, per quality key.
        work: data and reference for the fidelity check; None leaves it out.

    Returns:
        The artefact's manifest, without stage record and files.

    Raises:
        CompressError: the parent's files are not those of its manifest, or the method refuses.
        Refused: the engine disagrees with torch, or fidelity is below its floor.
    """
    method: Any = load_method(stage.method)
    refuse_altered(parent)
    model = parent.load()
    if has_scales(model) and stage.method != "export.onnx":
        refuse_cached(stage.method)
    copy_side_files(parent.path, directory)
    with naming_holders(model, stage.method):
        artifact: Artifact = method.run(model, stage.options, directory)
    task, parameters = model.task, count_parameters(model.module)
    raw = _raw_inputs(model, directory)
    nonzero = count_nonzero(model.module)
    del model
    stated = dict(artifact.manifest.formats)
    with closing(open_engine_of(artifact.engine, directory, formats=stated)) as engine:
        agreement = check_agreement(engine, stated.values(), directory, artifact.manifest.metrics)
        if not agreement.ok:
            raise Refused(
                f"{artifact.engine} disagrees with torch on the exported file: {agreement.failure}",
                "the file was kept with the name .rejected; please report it",
            )
        text = compare_text(engine, directory) if isinstance(engine, LlamaCppEngine) else {}
        quality = _fidelity(engine, floor, work)
    known = {k: v for k, v in parent.manifest.metrics.items() if k == SIDE_LOSSES}
    metrics = artifact.manifest.metrics | known | text
    metrics |= {
        "parameters": parameters,
        "nonzero_parameters": nonzero,
        "fidelity": quality,
        "raw_inputs": raw,
        **agreement.metrics(),
    }
    manifest = replace(artifact.manifest, base_model=parent.manifest.base_model, metrics=metrics)
    card = model_card(manifest, stage.method, task, parent.manifest.stages)
    (directory / CARD).write_text(card, encoding="utf-8")
    return manifest


def refuse_altered(parent: Checkpoint) -> None:
    """Refuse a checkpoint whose files changed: what is made of it would agree with itself.

    Raises:
        CompressError: names the file.
    """
    for name, stated in parent.manifest.files.items():
        if name != CARD and (problem := altered(parent.path / name, stated)):
            raise CompressError(
                f"'{parent.path.name}/{name}' is not as it was written: {problem}",
                f"compress verify {parent.path} says more; copy it or make it again",
            )


def _raw_inputs(model: Model, directory: Path) -> list[int] | None:
    """Shape of the inputs that a card's lines must make up, see `usage`; None where they read."""
    if model.family.sizes.vocabulary is not None:
        return None if model.processor is not None else [1, 3]
    channels, size = model.config.num_channels, model.config.image_size
    edges = (size, size) if isinstance(size, int) else size
    reads = (directory / "preprocessor_config.json").is_file() and channels == 3
    return None if reads else [1, channels, *edges]


def _fidelity(engine: Engine, floor: dict[str, float], work: Workbench | None) -> dict[str, float]:
    """Fidelity to the float source on held-out text; refuses what is below a floor."""
    if work is None:
        return {}  # preflight has refused a floor without data
    quality = fidelity.run(engine, fidelity.Options(), work)
    refuse_below(quality, floor)
    return quality


def refuse_below(quality: dict[str, float], floor: dict[str, float]) -> None:
    """Refuse a fidelity below its floor; a key that was not measured is no reason.

    Raises:
        Refused: names the key, its value and the floor.
    """
    for key, lowest in floor.items():
        if key in quality and not quality[key] >= lowest:
            raise Refused(
                f"{key} to the original is {quality[key]:.4f}, below the floor of {lowest}",
                "train longer, prune or quantize less, or lower the floor in the profile",
            )
