"""Importance scores on disk: importance.safetensors, beside the weights of the pruned model.

    hidden_D, stacks.0.neurons_LM, stacks.0.heads_LH, stacks.0.layers_L, ...   all float32

Shapes are those of importance.py. What was asked for stands in the header: {stacks: paths of the
stacks, settings: options, removed: layers of each stack that were to go, weights: digest of the
model that was scored}.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.errors import CompressError
from compressor.model.beside import TensorFile
from compressor.model.importance import Importance, StackImportance
from compressor.model.model import Model
from compressor.model.shapes import depth_axis

NAME = "importance.safetensors"
_ABOUT = {"stacks", "settings", "removed", "weights"}


@dataclass(frozen=True)
class Scores:
    """Importance and how it was measured.

    Attributes:
        stacks: paths of the stacks, e.g. encoder.block.
        settings: {option: value} of the measurement.
        removed: how many layers of each stack were to go; see prune/scores.py.
        weights: digest of all tensors of the model that was scored.
    """

    importance: Importance
    stacks: tuple[str, ...]
    settings: dict[str, Any]
    removed: tuple[int, ...]
    weights: str

    def file(self) -> TensorFile:
        """What is written."""
        tensors = {"hidden_D": self.importance.hidden_D}
        for number, stack in enumerate(self.importance.stacks):
            for field in fields(stack):
                if (found := getattr(stack, field.name)) is not None:
                    tensors[f"stacks.{number}.{field.name}"] = found
        about = {name: getattr(self, name) for name in sorted(_ABOUT)}
        return TensorFile({k: t.float().cpu() for k, t in tensors.items()}, about)

    def refuse_other_shapes(self, model: Model) -> None:
        """Raises CompressError, naming the axis, unless these scores can be those of a model."""
        sizes, stacks = model.sizes, model.family.stacks
        if len(self.stacks) != len(stacks):
            _refuse("stacks", len(self.stacks), len(stacks))
        _compare("hidden", self.importance.hidden_D, 0, sizes["hidden"])
        for number, (stack, own) in enumerate(zip(stacks, self.importance.stacks, strict=True)):
            depth = depth_axis(number)
            for scores in (own.layers_L, own.neurons_LM, own.heads_LH):
                _compare(depth, scores, 0, sizes[depth])
            _compare("mlp", own.neurons_LM, 1, sizes["mlp"])
            _compare("heads", own.heads_LH, 1, sizes["heads"])
            if (stack.cross_out is not None) != (own.cross_LH is not None):
                _refuse("cross attention", own.cross_LH is not None, stack.cross_out is not None)


def find_scores(path: str | Path) -> Path | None:
    """The file itself, or that of a stage directory; None where there is none."""
    file = Path(path) / NAME if Path(path).is_dir() else Path(path)
    return file if file.is_file() else None


def scores_path(path: str | Path) -> Path:
    """As `find_scores`.

    Raises:
        CompressError: there is none.
    """
    file = find_scores(path)
    if file is None:
        raise CompressError(
            f"there are no importance scores at '{path}'",
            f"name a directory that prune.minitron made, or its {NAME}",
        )
    return file


def read_scores(path: str | Path) -> Scores:
    """Read the scores that a stage left.

    Raises:
        CompressError: there is no such file, or it is damaged or of another kind.
    """
    file = scores_path(path)
    found = TensorFile.read(file)
    parts = [
        _part(found.tensors, f"stacks.{i}.") for i in range(len(found.about.get("stacks", ())))
    ]
    needed = {"neurons_LM", "heads_LH", "layers_L"}
    known = {field.name for field in fields(StackImportance)}
    whole = all(needed <= part.keys() <= known for part in parts)
    if found.about.keys() != _ABOUT or "hidden_D" not in found.tensors or not parts or not whole:
        raise CompressError(
            f"'{file}' holds no importance scores", f"name the {NAME} that prune.minitron wrote"
        )
    stacks = tuple(StackImportance(**part) for part in parts)
    about = found.about
    return Scores(
        Importance(stacks, found.tensors["hidden_D"]),
        tuple(about["stacks"]),
        about["settings"],
        tuple(about["removed"]),
        about["weights"],
    )


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _compare(axis: str, scores: Tensor, place: int, size: int) -> None:
    if scores.shape[place] != size:
        _refuse(axis, scores.shape[place], size)


def _refuse(axis: str, found: int, size: int) -> None:
    raise CompressError(
        f"these importance scores are of another model: {axis} is {found} there and {size} here",
        "take scores of this very model, or leave scores out to measure anew",
    )
