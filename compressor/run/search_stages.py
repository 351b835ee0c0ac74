"""What a search trains: the shapes of a search stage, and the two stages of one candidate."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from compressor.model.budget import Shape, TargetSizes
from compressor.model.candidates import candidates_for, grid, label, spread
from compressor.model.families import Family
from compressor.model.shapes import axes_of
from compressor.prune import minitron
from compressor.prune.scores import ScoreOptions
from compressor.run.methods import load_method
from compressor.run.profile import Stage
from compressor.search.minitron import Options

_SHARED = (*(field.name for field in fields(ScoreOptions)), "rescale")


def planned_shapes(family: Family, config: Any, options: Options) -> list[Shape]:
    """The shapes of a search, as far as they are known before anything is measured.

    Under a budget of latency the MLP is measured later; here it has the smallest width that can
    come of that, of which all others are multiples.

    Raises:
        CompressError: as `candidates_for`.
    """
    if options.latency is None:
        return candidates_for(family, config, options)
    before = family.read_sizes(config)
    least = min(options.mlp or (options.multiple, before["mlp"]))
    cells = [cell | {"mlp": least} for cell in grid(family, config, options)]
    return spread(before, cells, options.candidates)


def candidate_stages(
    family: Family, stage: Stage, shape: Shape, scores: Path | None = None
) -> tuple[Stage, Stage]:
    """Prune to `shape`, by the importance in the file `scores` if given; then retrain lightly."""
    options = stage.options
    axes = [a for a in axes_of(shape) if a != "kv_heads" or family.sizes.kv_heads is not None]
    sizes = TargetSizes(**{axis: shape[axis] for axis in axes})
    shared = {name: getattr(options, name) for name in _SHARED}
    shared["scores"] = str(scores) if scores else None
    name = options.method.partition(".")[2]
    light = load_method(options.method).Options(train=options.train, **options.objective)
    return (
        Stage("prune", "minitron", minitron.Options(sizes=sizes, **shared), seed=stage.seed),
        Stage("distill", name, light, stage.teacher, stage.seed),
    )


def candidate_name(number: int, shape: Shape) -> str:
    """Directory of candidate `number` (from 1), e.g. 03-l4-h8-d64-m160."""
    return f"{number:02d}-{label(shape)}"
