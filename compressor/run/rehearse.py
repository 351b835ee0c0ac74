"""Go through a profile on empty models: what would fail after hours fails now.

Models on the meta device have names, shapes and ties and no weights, so this takes milliseconds.
Wrong tasks, other vocabularies, layers that do not exist and groups that do not divide all show.
"""

from dataclasses import replace
from typing import Any

from compressor.errors import CompressError
from compressor.model.budget import sizes_for
from compressor.model.checkpoint import Checkpoint, load_processor, read_pooling
from compressor.model.families import find_family
from compressor.model.model import Model
from compressor.model.shapes import config_of, empty_model, model_class, resized
from compressor.model.sources import read_config, resolve
from compressor.prune import minitron
from compressor.quantize import rtn
from compressor.quantize.targets import quantizable, refuse_uneven
from compressor.run.methods import load_method
from compressor.run.profile import Profile, Stage

ONNX_BLOCK = 16  # smallest block of ONNX Runtime's quantized operators


def rehearse(profile: Profile, source: Checkpoint) -> None:
    """Run what can be run of every stage without weights.

    Raises:
        CompressError: what the stage itself would have raised, before any work.
    """
    made = [empty(source.path)]
    for stage in profile.stages:
        model = made[-1]
        if isinstance(stage.options, minitron.Options):
            model = _pruned(model, stage.options)
        elif stage.kind == "distill":
            teacher = _teacher(stage.teacher or profile.teacher, made)
            load_method(stage.method).objective(stage.options, model, teacher)
        made.append(model)
    exports = [s.name for s in profile.stages if s.kind == "export"]
    _check_groups(profile.stages, made, exports)
    for name, stages in profile.baselines.items():
        names = [s.name for s in stages if s.kind == "export"]
        try:
            _check_groups(stages, [made[0]] * (len(stages) + 1), names)
        except CompressError as error:
            raise CompressError(f"baseline '{name}': {error.what}", error.hint) from error


def empty(path: Any) -> Model:
    """The model of a checkpoint directory without its weights."""
    raw = read_config(path)
    family, config = find_family(raw["model_type"]), config_of(raw)
    module = empty_model(model_class(family, config), config)
    return Model(module, family, load_processor(path), pooling=read_pooling(path))


def _pruned(model: Model, options: minitron.Options) -> Model:
    sizes = sizes_for(model.family, model.config, options)
    config = resized(model.family, model.config, sizes)
    return replace(model, module=empty_model(type(model.module), config))


def _teacher(name: str, made: list[Model]) -> Model:
    if name == "input":
        return made[0]
    if name.startswith("stage:"):
        number = name.removeprefix("stage:")
        if not number.isdigit() or not 1 <= int(number) < len(made):
            raise CompressError(
                f"teacher '{name}' is no earlier stage", "teacher: input, or an earlier stage:N"
            )
        return made[int(number)]
    return empty(resolve(name).path)


def _check_groups(stages: tuple[Stage, ...], made: list[Model], exports: list[str]) -> None:
    for stage, model in zip(stages, made, strict=False):
        if isinstance(stage.options, rtn.Options):
            group, own = stage.options.group, stage.options
            targets = quantizable(model, own.embeddings, own.head)
            if own.uneven == "refuse":
                refuse_uneven(model, targets, group)
            if "onnx" in exports and group is not None and group % ONNX_BLOCK:
                raise CompressError(
                    f"ONNX Runtime has no groups of {group} inputs",
                    "quantize with group 16, 32, 64, 128, 256 or null",
                )
