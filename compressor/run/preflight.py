"""Before anything is computed: what each stage will need, and whether this machine has it.

The estimates (estimates.py) are arithmetic on shapes plus one 0.2-second matrix product for speed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compressor.errors import CompressError
from compressor.run.data_needs import (
    check_calibration,
    refuse_missing_data,
    refuse_unlabelled,
    refuse_unvalidated,
)
from compressor.run.estimates import EFFICIENCY, estimate, tensor_bytes
from compressor.run.from_float import open_model
from compressor.run.layout import search_place, stage_name
from compressor.run.machine import disk_free, machine, matmul_speed, memory_available
from compressor.run.outline import after_stage, outline_of, teacher_outline
from compressor.run.rehearse import rehearse
from compressor.run.setting import Setting
from compressor.screen import Silent


def plan(
    profile: str | Path,
    model: str | None = None,
    out: str | Path | None = None,
    teacher: str | None = None,
    data: str | None = None,
    set: Sequence[str] = (),
) -> dict[str, Any]:
    """Preflight only: {fits, stages: [{name, parameters_out, ...}], remarks, machine}.

    Arguments as for `compressor.run`.
    """
    from compressor.run.pipeline import prepare

    loaded = prepare(profile, model, teacher, data, set)
    source, home = open_model(loaded), Path(out or ".")
    return plan_run(Setting(loaded, source, home, Silent(), lambda text: None))


def plan_run(setting: Setting) -> dict[str, Any]:
    """Rehearse a run and estimate every stage on this machine, in the `plan --json` form.

    Raises:
        CompressError: a stage could not work, or the data cannot be read.
    """
    remarks = rehearse(setting.profile, setting.source, home=setting.home)
    for remark in remarks:
        setting.screen.say(remark)
        setting.log(remark)
    if setting.corpus is None and setting.profile.floor:  # reads the data, with a floor or not
        raise CompressError(
            "the profile sets a floor for fidelity and names no data", "add --data FILE"
        )
    refuse_unvalidated(setting)
    refuse_missing_data(setting)
    refuse_unlabelled(setting)
    check_calibration(setting)
    outline = original = outline_of(setting.source, setting.profile.dtype)
    speed = {d: matmul_speed(d) * EFFICIENCY[d] for d in EFFICIENCY}
    rates = (speed[torch.float32], max(speed.values()))
    memory, disk = memory_available(), disk_free(setting.home)
    stages = []
    for number, stage in enumerate(setting.profile.stages, start=1):
        after = after_stage(outline, stage)
        name = stage_name(number, stage.method)
        needs = estimate(
            setting, stage, outline, after, teacher_outline(setting, stage, original), rates
        )
        if stage.kind == "search":
            there = tensor_bytes(search_place(setting.home, name))
            needs["disk_bytes"] = max(needs["disk_bytes"] - there, 0)
        stages.append({"name": name} | needs | {"done": (setting.home / name).is_dir()})
        outline = after if stage.kind != "export" else outline
    open_stages = [s for s in stages if not s["done"]]
    fits = all(s["peak_memory_bytes"] <= memory for s in open_stages)
    fits = fits and sum(s["disk_bytes"] for s in open_stages) <= disk
    has = machine() | {"memory_available_bytes": memory, "disk_free_bytes": disk}
    return {"fits": fits, "stages": stages, "remarks": remarks, "machine": has}


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
