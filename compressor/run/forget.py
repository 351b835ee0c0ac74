"""Delete finished stages, or only their weights."""

import dataclasses
from pathlib import Path

from compressor.model.manifest import read_manifest, write_manifest
from compressor.model.sources import beside_weights, weight_files
from compressor.run.layout import SEARCH, remove

WEIGHTS_REMOVED = "weights_removed"  # in manifest.metrics, after keep: last


def forget(home: Path, number: int, scratch: Path) -> None:
    """Delete stage `number` and all after it, with the candidates of searches (--redo)."""
    stages, searches = home.glob("[0-9][0-9]-*"), home.glob(f"{SEARCH}/[0-9][0-9]")
    # candidates first: without their stage they would be taken for those of a killed search
    for directory in [*sorted(searches, reverse=True), *sorted(stages, reverse=True)]:
        if int(directory.name[:2]) >= number:
            remove(directory, scratch)


def drop_weights(directory: Path) -> None:
    """Delete the weights of a stage and say so in its manifest; what else it holds stays."""
    manifest = read_manifest(directory)
    if not manifest.metrics.get(WEIGHTS_REMOVED):
        weights = [file.name for file in (*weight_files(directory), *beside_weights(directory))]
        kept = {name: entry for name, entry in manifest.files.items() if name not in weights}
        metrics = manifest.metrics | {WEIGHTS_REMOVED: True}
        manifest = dataclasses.replace(manifest, files=kept, metrics=metrics)
        write_manifest(directory, manifest)
    for file in directory.glob("*.safetensors"):
        if file.name not in manifest.files:  # also what a killed run did not come to delete
            file.unlink()
