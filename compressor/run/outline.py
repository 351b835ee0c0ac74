"""A model as far as sizes go, and what every stage makes of it: shapes alone, nothing is loaded."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compressor.model.budget import sizes_for
from compressor.model.candidates import Counts, budget_of
from compressor.model.checkpoint import Checkpoint
from compressor.model.families import Family, find_family
from compressor.model.manifest import quantized
from compressor.model.model import Model
from compressor.model.shapes import config_of, empty_model, model_class, resized
from compressor.model.sources import read_config, weight_files
from compressor.model.stream import open_tensors
from compressor.prune import ast, minitron
from compressor.prune.sparsity import SparseOptions, targets
from compressor.quantize import qsd
from compressor.quantize.weights import GridOptions, Mixed, WeightOptions
from compressor.run.methods import learns
from compressor.run.profile import Stage
from compressor.run.quantized_size import quantized_bytes
from compressor.run.search_stages import candidate_stages, planned_shapes
from compressor.run.setting import Setting
from compressor.search import minitron as search


@dataclass(frozen=True)
class Outline:
    """A model as far as sizes go: what preflight follows through the stages."""

    family: Family
    config: Any
    sizes: dict[str, int]
    parameters: int
    weight_bytes: float  # per parameter, on disk
    dtype: torch.dtype = torch.float32  # of float weights, on disk
    stored: frozenset[str] | None = None  # tensors of the source
    sided: bool = False


def outline_of(checkpoint: Checkpoint, chosen: str | None = None) -> Outline:
    """That of a checkpoint, by its config and files; `chosen` is the dtype it will be saved in."""
    raw = read_config(checkpoint.path, own=True)
    config, family = config_of(raw), find_family(raw["model_type"])
    if chosen:
        config.dtype = getattr(torch, chosen)
    sizes = family.read_sizes(config)
    parameters = Counts(family, config)(sizes)
    dtype = config.dtype or torch.float32
    files = weight_files(checkpoint.path)
    width = float(dtype.itemsize)
    if quantized(checkpoint.manifest.formats):
        width = sum(file.stat().st_size for file in files) / parameters
    stored = frozenset(open_tensors(files, mapped=True))
    sided = any(form.side_rank is not None for form in checkpoint.manifest.formats.values())
    return Outline(family, config, sizes, parameters, width, dtype, stored, sided)


def teacher_outline(setting: Setting, stage: Stage, original: Outline) -> Outline:
    """The model that a stage learns from; one of this run is no larger than what it starts from."""
    name = stage.teacher or setting.profile.teacher
    if not learns(stage.method) or name == "input" or name.startswith("stage:"):
        return original
    return outline_of(setting.teacher_of(stage))


def after_stage(outline: Outline, stage: Stage) -> Outline:
    """The outline a stage leaves; only pruning and quantization change it."""
    options = stage.options
    if isinstance(options, search.Options):
        shape = planned_shapes(outline.family, outline.config, options)[0]
        pruned, _ = candidate_stages(outline.family, stage, shape)
        return replace(after_stage(outline, pruned), parameters=_searched(outline, options))
    if isinstance(options, minitron.Options):
        sizes = sizes_for(outline.family, outline.config, options)
        parameters = Counts(outline.family, outline.config)(sizes)
        config = resized(outline.family, outline.config, sizes)
        return replace(outline, config=config, sizes=sizes, parameters=parameters)
    if isinstance(options, ast.Options) and options.side is not None:
        side = sum(_side_parameters(linear, options) for linear in masked_layers(outline, options))
        return replace(outline, parameters=outline.parameters + side, sided=True)
    if isinstance(options, qsd.Options):
        return replace(outline, weight_bytes=options.bits / 8)
    if isinstance(options, WeightOptions):
        exact = _quantized_bytes(outline, options)
        if exact is not None:
            return replace(outline, weight_bytes=exact / outline.parameters)
        tables = outline.sizes["vocabulary"] * outline.sizes["hidden"] / outline.parameters
        packed = options.bits / 8 + 2 / (options.group or outline.sizes["hidden"])
        kept = 0.0 if options.embeddings else tables
        if isinstance(options, GridOptions) and options.mixed is not None:
            packed = _mixed_width(options.mixed, outline.parameters * (1 - kept))
        width = packed * (1 - kept) + outline.weight_bytes * kept
        return replace(outline, weight_bytes=width)
    return outline


def _mixed_width(mixed: Mixed, weights: float) -> float:
    """Bytes per weight of layers that have a budget together, scales included; 16 bits at most."""
    return mixed.average_bits / 8 if mixed.average_bits else min(2.0, (mixed.bytes or 0) / weights)


def _quantized_bytes(outline: Outline, options: WeightOptions) -> int | None:
    """Bytes of the weight file of a quantize stage, where formats tell them."""
    module = empty_model(model_class(outline.family, outline.config), outline.config)
    model = Model(module, outline.family, None)
    return quantized_bytes(model, options, outline.dtype, outline.sided, outline.stored)


def masked_layers(outline: Outline, options: SparseOptions) -> list[nn.Linear]:
    """The layers that a sparse stage masks, without their weights."""
    module = empty_model(model_class(outline.family, outline.config), outline.config)
    return [*targets(Model(module, outline.family, None), options).values()]


def _side_parameters(linear: nn.Linear, options: ast.Options) -> int:
    """Parameters of the side path of a layer; none where `side` does not divide its inputs."""
    k, inputs = options.side, linear.in_features
    if k is None or inputs % k:
        return 0
    learns = inputs if options.side_projection == "trainable" else 0
    return inputs // k * (linear.out_features + learns)


def _searched(outline: Outline, options: search.Options) -> int:
    """Parameters that a search leaves; a share of latency is taken for one of parameters."""
    share = replace(options, latency=None, parameters=options.latency) if options.latency else None
    return budget_of(outline.family, outline.config, share or options)
