"""Before anything is computed: what each stage will need, and whether this machine has it.

The estimates are arithmetic on shapes plus one 0.2-second matrix product for speed. The report
puts them beside what was measured. They are meant to be right within a factor of two.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.distill import latent
from compressor.distill import minitron as minitron_retraining
from compressor.distill.logits import kept_bytes
from compressor.errors import CompressError
from compressor.model.budget import sizes_for
from compressor.model.candidates import Counts, budget_of
from compressor.model.families import Family, find_family
from compressor.model.model import Model
from compressor.model.shapes import axes_of, config_of, empty_model, model_class, resized
from compressor.model.sources import read_config, weight_files
from compressor.model.stream import open_tensors
from compressor.prune import ast, minitron, squarehead
from compressor.prune.damage import BY_ANSWERS
from compressor.prune.scores import by_removal, removable
from compressor.prune.sparsity import SparseOptions, targets
from compressor.quantize import qsd
from compressor.quantize.trained import TrainedOptions
from compressor.quantize.weights import GridOptions, Mixed, WeightOptions
from compressor.run.data_needs import check_calibration, refuse_missing_data, refuse_unranked
from compressor.run.layout import search_place, stage_name
from compressor.run.machine import disk_free, machine, matmul_speed, memory_available
from compressor.run.methods import learns
from compressor.run.oneshot_needs import oneshot_needs
from compressor.run.profile import Stage
from compressor.run.quantized_size import quantized_bytes
from compressor.run.rehearse import rehearse
from compressor.run.search_stages import candidate_stages, planned_shapes
from compressor.run.setting import Setting, open_source
from compressor.screen import Silent
from compressor.search import minitron as search
from compressor.training.calibrated import CalibrationOptions

# Resident bytes of a process that has imported torch and transformers and run one forward.
PROCESS_BYTES = 700_000_000
# Share of the speed of a large matrix product that a small transformer reaches in training and
# inference (narrow matrices, norms, softmax), measured on a 22.7M encoder with two cores.
EFFICIENCY = {torch.float32: 0.6, torch.bfloat16: 0.24}
EXPORT_BYTES = 250_000_000  # what torch.export and onnxscript hold beside the model
EXPORT_SECONDS = 12.0  # torch.export and graph optimization, nearly independent of size
MEASURE_SECONDS = 6.0  # a process that imports torch, opens a model and times it
# of a weight that trains behind a mask or a projection: mask or code, and the copy that is used
MASKED_BYTES = 5.0
# Bytes that training holds per hidden unit, token and layer for the backward pass.
ACTIVATION_BYTES = 180


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


def plan(
    profile: str | Path,
    model: str | None = None,
    out: str | Path | None = None,
    teacher: str | None = None,
    data: str | None = None,
    set: Sequence[str] = (),
) -> dict[str, Any]:
    """Preflight only: {fits, stages: [{name, parameters_out, ...}], machine}.

    Arguments as for `compressor.run`.
    """
    from compressor.run.pipeline import prepare

    loaded = prepare(profile, model, teacher, data, set)
    source, home = open_source(str(loaded.model)), Path(out or ".")
    return plan_run(Setting(loaded, source, home, Silent(), lambda text: None))


def plan_run(setting: Setting) -> dict[str, Any]:
    """Rehearse a run and estimate every stage on this machine, in the `plan --json` form.

    Raises:
        CompressError: a stage could not work, or the data cannot be read.
    """
    for remark in rehearse(setting.profile, setting.source, home=setting.home):
        setting.screen.say(remark)
        setting.log(remark)
    if setting.corpus is None and setting.profile.floor:  # reads the data, with a floor or not
        raise CompressError(
            "the profile sets a floor for fidelity and names no data", "add --data FILE"
        )
    refuse_unranked(setting)
    refuse_missing_data(setting)
    check_calibration(setting)
    outline = original = _outline(setting)
    speed = {d: matmul_speed(d) * EFFICIENCY[d] for d in EFFICIENCY}
    rates = (speed[torch.float32], max(speed.values()))
    memory, disk = memory_available(), disk_free(setting.home)
    stages = []
    for number, stage in enumerate(setting.profile.stages, start=1):
        after = _after(outline, stage)
        name = stage_name(number, stage.method)
        needs = _estimate(setting, stage, outline, after, original, rates)
        if stage.kind == "search":
            there = _tensor_bytes(search_place(setting.home, name))
            needs["disk_bytes"] = max(needs["disk_bytes"] - there, 0)
        stages.append({"name": name} | needs | {"done": (setting.home / name).is_dir()})
        outline = after if stage.kind != "export" else outline
    open_stages = [s for s in stages if not s["done"]]
    fits = all(s["peak_memory_bytes"] <= memory for s in open_stages)
    fits = fits and sum(s["disk_bytes"] for s in open_stages) <= disk
    has = machine() | {"memory_available_bytes": memory, "disk_free_bytes": disk}
    return {"fits": fits, "stages": stages, "machine": has}


def refuse_if_too_big(plan: dict[str, Any]) -> None:
    """Stop before any work when a stage cannot fit, with the numbers.

    Raises:
        CompressError: not enough memory or disk.
    """
    has = plan["machine"]
    stages = [stage for stage in plan["stages"] if not stage["done"]]
    for stage in stages:
        if stage["peak_memory_bytes"] > has["memory_available_bytes"]:
            raise CompressError(
                f"{stage['name']} needs about {_size(stage['peak_memory_bytes'])} of memory, "
                f"{_size(has['memory_available_bytes'])} are available",
                "lower train.batch or train.length, set offload: true where there is one, or free "
                "memory",
            )
    needed = sum(stage["disk_bytes"] for stage in stages)
    free = has["disk_free_bytes"]
    if needed > free:
        raise CompressError(
            f"the run needs about {_size(needed)} of disk, {_size(free)} are free",
            "free disk space, or give --out on another disk",
        )


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _outline(setting: Setting) -> Outline:
    raw = read_config(setting.source.path)
    config, family = config_of(raw), find_family(raw["model_type"])
    if setting.profile.dtype:
        config.dtype = getattr(torch, setting.profile.dtype)
    sizes = family.read_sizes(config)
    width = float(config.dtype.itemsize) if config.dtype is not None else 4.0
    stored = frozenset(open_tensors(weight_files(setting.source.path), mapped=True))
    dtype = config.dtype or torch.float32
    return Outline(family, config, sizes, Counts(family, config)(sizes), width, dtype, stored)


def _after(outline: Outline, stage: Stage) -> Outline:
    """The outline a stage leaves; only pruning and quantization change it."""
    options = stage.options
    if isinstance(options, search.Options):
        shape = planned_shapes(outline.family, outline.config, options)[0]
        pruned, _ = candidate_stages(outline.family, stage, shape)
        return replace(_after(outline, pruned), parameters=_searched(outline, options))
    if isinstance(options, minitron.Options):
        sizes = sizes_for(outline.family, outline.config, options)
        parameters = Counts(outline.family, outline.config)(sizes)
        config = resized(outline.family, outline.config, sizes)
        return replace(outline, config=config, sizes=sizes, parameters=parameters)
    if isinstance(options, ast.Options) and options.side is not None:
        side = sum(_side_parameters(linear, options) for linear in _masked(outline, options))
        return replace(outline, parameters=outline.parameters + side, sided=True)
    if isinstance(options, qsd.Options):
        return replace(outline, weight_bytes=options.bits / 8)
    if isinstance(options, WeightOptions):
        exact = _quantized_bytes(outline, options)
        if exact is not None:
            return replace(outline, weight_bytes=exact / outline.parameters)
        tables = outline.sizes["vocabulary"] * outline.sizes["hidden"] / outline.parameters
        packed = options.bits / 8 + 2 / (options.group or outline.sizes["hidden"])
        kept = 0.0 if options.quantizes_ends[0] else tables
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


def _masked(outline: Outline, options: SparseOptions) -> list[nn.Linear]:
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
    light = _estimate(setting, train, before, after, teacher, rates)
    least = {axis: min(shape[axis] for shape in shapes) for axis in axes_of(before.sizes)}
    flattest = replace(after, sizes=before.sizes | least)  # its layers decide what is removed
    prune = _estimate(setting, cut, before, flattest, teacher, rates)
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


def _tensor_bytes(place: Path) -> int:
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
        memory += 4.0 * teacher.parameters
        work += (6.0 if corrects else 2.0) * (teacher.parameters - tables)
    if isinstance(stage.options, ast.Options):
        masked = sum(linear.weight.numel() for linear in _masked(before, stage.options))
        memory += MASKED_BYTES * masked
    if isinstance(stage.options, TrainedOptions | qsd.Options):
        memory += MASKED_BYTES * after.parameters
    positions = train.batch * setting.reading.positions(train.length)
    for trained in (after, teacher) if corrects else (after,):
        depth = trained.sizes["layers"] + trained.sizes.get("decoder_layers", 0)
        memory += positions * trained.sizes["hidden"] * depth * ACTIVATION_BYTES
    disk = 24.0 * (after.parameters + moving)  # two snapshots of weights and both Adam moments
    if isinstance(stage.options, latent.Options) and latent.caches(
        stage.options, setting.task, before.config
    ):
        disk += 2.0 * teacher.sizes["hidden"] * tokens  # at most: a row is stored once
    return memory, disk + tokens * _kept(stage.options, teacher), tokens * work / rate


def _estimate(
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
    size = after.parameters * after.weight_bytes
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
    elif stage.kind == "export":
        seconds += EXPORT_SECONDS
        memory = PROCESS_BYTES + EXPORT_BYTES + 40.0 * teacher.parameters
    return {
        "parameters_out": after.parameters,
        "bytes_out": round(size),
        "peak_memory_bytes": int(memory),
        "disk_bytes": int(disk),
        "seconds": round(seconds, 1),
    }
