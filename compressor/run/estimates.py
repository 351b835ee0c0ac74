"""What one stage will need: peak memory, disk and seconds, by arithmetic on shapes.

The numbers are meant to be right within a factor of two; the report puts them beside what was
measured.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compressor.distill import latent
from compressor.distill import minitron as minitron_retraining
from compressor.distill.logits import kept_bytes
from compressor.export import gguf
from compressor.model.shapes import axes_of
from compressor.numerics.ggml_blocks import BLOCK, FORMS
from compressor.prune import ast, minitron, squarehead
from compressor.prune.damage import BY_ANSWERS
from compressor.prune.scores import by_removal, removable
from compressor.quantize import cache, qsd
from compressor.quantize.trained import TrainedOptions
from compressor.run.methods import learns
from compressor.run.oneshot_needs import oneshot_needs
from compressor.run.outline import Outline, masked_layers
from compressor.run.profile import Stage
from compressor.run.search_stages import candidate_stages, planned_shapes
from compressor.run.setting import Setting
from compressor.training.calibrated import CalibrationOptions
from compressor.training.validation import MOST

# Resident bytes of a process that has imported torch and transformers and run one forward.
PROCESS_BYTES = 700_000_000
# Share of the speed of a large matrix product that a small transformer reaches in training and
# inference (narrow matrices, norms, softmax), measured on a 22.7M encoder with two cores.
EFFICIENCY = {torch.float32: 0.6, torch.bfloat16: 0.24}
EXPORT_BYTES = 250_000_000  # what torch.export and onnxscript hold beside the model
EXPORT_SECONDS = 12.0  # torch.export and graph optimization, nearly independent of size
MEASURE_SECONDS = 6.0  # a process that imports torch, opens a model and times it
CLIP_SECONDS = 0.9e-6  # of the search for the clipped grid, for each weight of it
# of a weight that trains behind a mask or a projection: mask or code, and the copy that is used
MASKED_BYTES = 5.0
CODE_BYTES = 1.25  # a code has a byte of its own in memory, and shares a scale and a zero point
# of a weight in GGUF, scales included
FILE_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q4_k": 144 / 256}
FILE_BYTES |= {form.name: form.bytes / BLOCK for form in FORMS}
# Bytes that training holds per hidden unit, token and layer for the backward pass.
ACTIVATION_BYTES = 180


def estimate(
    setting: Setting,
    stage: Stage,
    before: Outline,
    after: Outline,
    teacher: Outline,
    rates: tuple[float, float],
) -> dict[str, Any]:
    """Numbers of one stage; `rates` are float32 and best floating-point operations a second."""
    if stage.kind == "search":
        return _estimate_search(setting, stage, before, after, teacher, rates)
    size = after.parameters * _width(stage, after)
    memory, disk, seconds = PROCESS_BYTES + 8.0 * before.parameters, size, 2.0
    if stage.trains:
        own = _training(setting, stage, before, after, teacher, rates[1])
        memory, disk, seconds = own[0], disk + own[1], seconds + own[2]
        rounds = isinstance(stage.options, squarehead.Options)
        disk += 8.0 * before.parameters if rounds else 0.0  # what rounds start from
    if isinstance(stage.options, minitron.Options):
        seconds += _scoring_work(setting, stage.options, before, after) / rates[0]
    elif isinstance(stage.options, CalibrationOptions) and stage.options.reads_data:
        positions = setting.reading.positions(stage.options.tokens(before.config))
        given = (before.sizes, before.parameters, before.weight_bytes, positions, rates[0])
        own = oneshot_needs(stage.options, *given)
        least = memory if stage.trains else 0.0
        memory, disk, seconds = max(least, PROCESS_BYTES + own[0]), disk + own[1], seconds + own[2]
    elif isinstance(stage.options, cache.Options):
        tokens = setting.reading.positions(stage.options.tokens(before.config))
        seconds += 2.0 * before.parameters * tokens * stage.options.samples / rates[0]
    elif stage.kind == "export":
        seconds += EXPORT_SECONDS
        memory = PROCESS_BYTES + EXPORT_BYTES + 40.0 * teacher.parameters
    return {
        "parameters_out": after.parameters,
        "bytes_out": round(size),
        "peak_memory_bytes": int(memory),
        "disk_bytes": int(disk),
        "seconds": round(seconds + _clipping(stage, after), 1),
    }


def _clipping(stage: Stage, after: Outline) -> float:
    """Seconds that a search for clipped grids takes."""
    return CLIP_SECONDS * after.parameters * (getattr(stage.options, "clip", "none") == "mse")


def _width(stage: Stage, after: Outline) -> float:
    """Bytes of a weight in what a stage writes; an export may store another type."""
    if isinstance(stage.options, gguf.Options):
        kind = stage.options.requantize or stage.options.type
        return FILE_BYTES.get(kind, after.weight_bytes)
    halves = getattr(stage.options, "dtype", None) == "float16" and stage.kind == "export"
    return min(2.0, after.weight_bytes) if halves else after.weight_bytes


def _estimate_search(
    setting: Setting,
    stage: Stage,
    before: Outline,
    after: Outline,
    teacher: Outline,
    rates: tuple[float, float],
) -> dict[str, Any]:
    """Numbers of a search: its candidates one after the other, and what it keeps of each."""
    shapes = planned_shapes(before.family, before.config, stage.options)
    count, (cut, train) = len(shapes), candidate_stages(before.family, stage, after.sizes)
    light = estimate(setting, train, before, after, teacher, rates)
    least = {axis: min(shape[axis] for shape in shapes) for axis in axes_of(before.sizes)}
    flattest = replace(after, sizes=before.sizes | least)  # its layers decide what is removed
    prune = estimate(setting, cut, before, flattest, teacher, rates)
    kept = (count + 1) * light["bytes_out"]
    passes = count if stage.options.contiguous else 1  # else all are cut by the same scores
    timed = stage.options.latency is not None  # by another process, which loads the model
    measured = MEASURE_SECONDS * (3 * count + 1) if timed else 0.0
    memory = prune["peak_memory_bytes"] + (PROCESS_BYTES if timed else 0)
    return light | {
        "peak_memory_bytes": max(memory, light["peak_memory_bytes"]),
        "disk_bytes": kept + prune["disk_bytes"] + light["disk_bytes"],
        "seconds": round(prune["seconds"] * passes + count * light["seconds"] + measured, 1),
        "candidates": count,
    }


def tensor_bytes(place: Path) -> int:
    """What a search that was stopped holds on disk already: weights, and snapshots of training."""
    total = 0
    for file in place.rglob("*.safetensors"):
        with suppress(FileNotFoundError):  # another process may finish with a file meanwhile
            total += file.stat().st_size
    return total


def _scoring_work(
    setting: Setting, options: minitron.Options, before: Outline, after: Outline
) -> float:
    """Operations of importance: one pass for all units, one more for every removal of layers."""
    if options.scores is not None:
        return 0.0
    tables = before.sizes["vocabulary"] * before.sizes["hidden"]
    removals = [
        len(removable(before.sizes[axis], before.sizes[axis] - after.sizes[axis], options))
        for axis in ("layers", "decoder_layers")
        if axis in before.sizes
    ]
    passes = 1.0 * (before.parameters - tables)
    if by_removal(options) and any(removals):
        whole = options.layer_importance != "perplexity"  # what is lost, not what is left
        head = tables if options.layer_importance in BY_ANSWERS else 0
        passes += (sum(removals) + whole) * (before.parameters - tables + head)
    return 2.0 * passes * options.samples * setting.reading.positions(options.length)


def _kept(options: Any, teacher: Outline) -> int:
    """Bytes of the teacher's answers to one token, at most, where the largest logits are kept."""
    if getattr(options, "top_k", None) is None:
        return 0
    size = kept_bytes(options.top_k, teacher.sizes["vocabulary"])
    if isinstance(options, minitron_retraining.Options) and options.intermediate != "off":
        size += 2 * 2 * teacher.sizes["hidden"]  # two states in float16
    return size


def _held_bytes(model: Outline) -> float:
    """Bytes of memory that a weight of a loaded model takes: float32, or a code and its scale."""
    return 4.0 if model.weight_bytes >= 2 else CODE_BYTES


def _asks_teacher(stage: Stage) -> bool:
    """Whether a teacher is in memory; prune.ast needs none where only the text counts."""
    alone = isinstance(stage.options, ast.Options) and stage.options.kl == 0
    return learns(stage.method) and not alone


def _training(
    setting: Setting, stage: Stage, before: Outline, after: Outline, teacher: Outline, rate: float
) -> tuple[float, float, float]:
    """Peak memory, disk of the scratch and seconds of a training at `rate` operations a second."""
    train, tables = stage.options.train, after.sizes["vocabulary"] * after.sizes["hidden"]
    tokens = train.steps * train.batch * train.accumulate * setting.row_tokens(train.length)
    corrects = getattr(stage.options, "correct_teacher", None) is not None
    moving = teacher.parameters if corrects else 0  # weights of a teacher that is trained
    memory = PROCESS_BYTES + 16.0 * after.parameters + 12.0 * moving
    work = 6.0 * (after.parameters - tables)
    if _asks_teacher(stage):
        memory += _held_bytes(teacher) * teacher.parameters
        work += (6.0 if corrects else 2.0) * (teacher.parameters - tables)
    if isinstance(stage.options, ast.Options):
        masked = sum(linear.weight.numel() for linear in masked_layers(before, stage.options))
        memory += MASKED_BYTES * masked
    if isinstance(stage.options, TrainedOptions | qsd.Options):
        memory += MASKED_BYTES * after.parameters
    positions = train.batch * setting.reading.positions(train.length)
    for trained in (after, teacher) if corrects else (after,):
        depth = trained.sizes["layers"] + trained.sizes.get("decoder_layers", 0)
        memory += positions * trained.sizes["hidden"] * depth * ACTIVATION_BYTES
    disk = 24.0 * (after.parameters + moving)  # two snapshots of weights and both Adam moments
    seconds = tokens * work / rate
    if train.validate_every:
        looks = -(-train.steps // train.validate_every)
        seen = looks * MOST * train.batch * setting.row_tokens(train.length)  # at most
        seconds += seen * work / 3 / rate  # a forward is a third of a step
        disk += 12.0 * after.parameters  # the best of now, of the last snapshot, and while written
    if isinstance(stage.options, latent.Options) and latent.caches(
        stage.options, setting.task, before.config
    ):
        disk += 2.0 * teacher.sizes["hidden"] * tokens  # at most: a row is stored once
    return memory, disk + tokens * _kept(stage.options, teacher), seconds
