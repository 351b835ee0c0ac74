"""Zeros that no manifest speaks of: those of a sparse checkpoint that lost its manifest.json.

Nothing holds them, so whatever trains refills them. To find them takes one pass over the weights,
a tensor at a time.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from compressor.model.conv1d import turned_names
from compressor.model.model import Model
from compressor.model.packed import dense_view
from compressor.model.sources import is_packed, weight_files
from compressor.model.sparse import prunable
from compressor.model.stream import open_tensors, read_tensor
from compressor.numerics.masks import share_of_zeros

_MANY = 0.2  # share of zeros that no dense training leaves


def unpromised_zeros(model: Model, path: Path) -> str:
    """What to tell of a directory whose layers are mostly sparse, in one sentence; else "".

    Args:
        model: that of the directory; its weights are not read and may be missing.
        path: a checkpoint directory without manifest.
    """
    shares = _shares(model, path)
    many = [share for share in shares.values() if share >= _MANY]
    if 2 * len(many) <= len(shares):
        return ""
    low, high = f"{min(many):.1%}", f"{max(many):.1%}"
    return (
        f"{len(many)} of {len(shares)} layers of '{path.name}' have "
        f"{low if low == high else f'{low} to {high}'} zeros, and without a manifest.json nothing "
        "will hold them: put the manifest.json of the pruned checkpoint beside its weights, or "
        "prune again"
    )


def _shares(model: Model, path: Path) -> dict[str, float]:
    """{name of a weight that pruning would take: its share of zeros}; files may omit a prefix."""
    prefix = f"{model.base.base_model_prefix}."
    wanted = {f"{name}.weight".removeprefix(prefix) for name in prunable(model)}
    files = weight_files(path)
    weights = _packed(model, files) if is_packed(files) else _float(files)
    return {
        name: share_of_zeros(read())
        for name, read in weights
        if name.removeprefix(prefix) in wanted
    }


def _float(files: list[Path]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every tensor's name, and what maps its file for as long as it is looked at."""
    for file in files:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
        for name in names:
            yield name, partial(_mapped, file, name)


def _mapped(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt", backend="mmap") as opened:  # six times as fast as reading it
        return opened.get_tensor(name)


def _packed(model: Model, files: list[Path]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    turned = turned_names(type(model.module), model.config)
    for name, unread in dense_view(open_tensors(files, mapped=False), turned).items():
        yield name, partial(read_tensor, unread)
