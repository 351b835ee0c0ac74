"""Every mistake of a profile, found in seconds: file, line and the nearest valid name."""

import dataclasses
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from compressor.errors import CompressError
from compressor.model.kv_cache import METHOD
from compressor.options import nearest
from compressor.run.make_options import make_options
from compressor.run.methods import KINDS, load_method, method_names
from compressor.run.profile import CUTS, KEYS, Profile, Stage, resolved_text
from compressor.run.yaml_lines import Document

DATA_KEYS = ("train", "calibration", "validation", "heldout")
DEFAULT_MEASURES = ("size", "latency", "memory", "fidelity")
QUALITY_KEYS = ("accuracy", "spearman", "top1_agreement", "cosine")
TEXT_KEYS = ("name", "description", "model", "teacher")
BASELINE_NAME = re.compile(r"[\w-][\w .-]*", re.ASCII)  # it becomes a folder of the run


def validate(document: Document) -> Profile:
    """Check every key, method and option of a document and build the profile.

    Raises:
        CompressError: the first mistake, with file, line and nearest name.
    """
    raw = document.data
    for key in raw:
        if key not in KEYS:
            raise CompressError(
                f"{document.where((key,))}unknown key '{key}'{nearest(key, KEYS)}",
                f"keys of a profile: {', '.join(KEYS)}",
            )
    choose(document, "keep", ("all", "last"))
    choose(document, "dtype", (None, "float32", "bfloat16"))
    for key in TEXT_KEYS:
        if raw.get(key) is not None:
            document.expect((key,), raw[key], str, f'{key}: "..."')
    if raw.get("from_float") is not None:
        document.expect(("from_float",), raw["from_float"], bool, "from_float: true")
    seed = raw.get("seed", 0)
    _check_seed(document, ("seed",), seed)
    stages = _stages(document, ("stages",), raw.get("stages"))
    check_order(document, ("stages",), stages)
    profile = Profile(
        name=str(raw.get("name") or Path(document.name).stem),
        description=" ".join(str(raw.get("description") or "").split()),
        model=raw.get("model"),
        from_float=raw.get("from_float") or False,
        teacher=raw.get("teacher") or "input",
        data=_data(document),
        seed=seed,
        dtype=raw.get("dtype"),
        keep=raw.get("keep") or "all",
        stages=stages,
        measures=_measures(document),
        baselines=_baselines(document),
        floor=_floor(document),
    )
    return dataclasses.replace(profile, text=resolved_text(profile))


def choose(document: Document, key: str, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that is none of the allowed ones."""
    value = document.data.get(key, allowed[0])
    if value not in allowed:
        names = [str(a) for a in allowed if a]
        raise CompressError(
            f"{document.where((key,))}{key} is '{value}'{nearest(value, names)}",
            f"{key}: one of {', '.join(names)}",
        )


def _check_seed(document: Document, path: tuple[Any, ...], seed: Any) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise CompressError(
            f"{document.where(path)}seed must be a whole number >= 0 (got {seed!r})", "seed: 0"
        )


def _stages(document: Document, path: tuple[Any, ...], raw: Any) -> tuple[Stage, ...]:
    if not isinstance(raw, list) or not raw:
        raise CompressError(
            f"{document.where(path)}'{path[-1]}' must be a list of stages",
            "stages: [ {prune.minitron: {parameters: 0.5}}, ... ]",
        )
    return tuple(_stage(document, (*path, i), item) for i, item in enumerate(raw))


def _stage(document: Document, path: tuple[Any, ...], raw: Any) -> Stage:
    where = document.where(path)
    if isinstance(raw, str):
        raw = {raw: {}}
    if not isinstance(raw, dict) or len(raw) != 1:
        raise CompressError(
            f"{where}a stage is one KIND.NAME with its options", "- distill.kd: {temperature: 1}"
        )
    method, given = next(iter(raw.items()))
    module = load_method(str(method), document.where((*path, method)))
    kind, _, name = str(method).partition(".")
    if kind not in KINDS:
        raise CompressError(f"{where}'{method}' is no stage", f"kinds: {', '.join(KINDS)}")
    path = (*path, method)
    given = {} if given is None else given
    document.expect(path, given, dict, f"- {method}: {{option: value}}")
    teacher, seed = given.get("teacher"), given.get("seed")
    if teacher is not None:
        document.expect((*path, "teacher"), teacher, str, "teacher: input, or stage:N")
    if seed is not None:
        _check_seed(document, (*path, "seed"), seed)
    rest = {key: value for key, value in given.items() if key not in ("teacher", "seed")}
    options = make_options(module.Options, rest, document, path)
    if kind == "search":
        _check_light(options, document, path)
    return Stage(kind, name, options, teacher, seed)


def _check_light(options: Any, document: Document, path: tuple[Any, ...]) -> None:
    """Refuse what the distill method of a search would refuse."""
    light = load_method(options.method, document.where((*path, "method"))).Options
    make_options(
        light, {"train": options.train, **options.objective}, document, (*path, "objective")
    )


def _baselines(document: Document) -> dict[str, tuple[Stage, ...]]:
    raw = document.data.get("baselines")
    raw = {} if raw is None else raw
    document.expect(("baselines",), raw, dict, "baselines: {onnx float32: [export.onnx]}")
    found = {}
    for name, given in raw.items():
        path = ("baselines", name)
        if not isinstance(name, str) or not BASELINE_NAME.fullmatch(name):
            raise CompressError(
                f"{document.where(path)}baseline {name!r} must be named by a text of letters, "
                "digits, spaces, dots, - and _ that begins with no dot or space",
                "onnx float32: [export.onnx]",
            )
        found[name] = _stages(document, path, given)
        check_order(document, path, found[name])
        if any(stage.kind == "search" for stage in found[name]):
            raise CompressError(
                f"{document.where(path)}baseline '{name}' has a search",
                "search in the stages of the profile: a baseline is what there was before",
            )
        if sum(stage.kind == "export" for stage in found[name]) > 1:
            raise CompressError(
                f"{document.where(path)}baseline '{name}' has several exports",
                "write one baseline for each export",
            )
    return found


def check_order(document: Document, path: tuple[Any, ...], stages: tuple[Stage, ...]) -> None:
    """Prune, distill and search come first, then at most one quantize, then exports.

    What changes shapes comes before what leaves a pattern of zeros.
    """
    order = {"prune": 0, "distill": 0, "search": 0, "quantize": 1, "export": 2}
    for i, (before, after) in enumerate(pairwise(stages), start=1):
        where = document.where((*path, i))
        both = before.kind == after.kind == "quantize"
        if both and METHOD not in (before.method, after.method):
            raise CompressError(f"{where}a second quantize stage", "keep one of them")
        if order[after.kind] < order[before.kind]:
            raise CompressError(
                f"{where}{after.method} cannot come after {before.method}",
                "order: prune/distill/search, then one quantize, then exports",
            )
    for i, stage in enumerate(stages):
        sparse = [before.method for before in stages[:i] if before.sparse]
        if sparse and stage.kind in CUTS and not stage.sparse:
            raise CompressError(
                f"{document.where((*path, i))}{stage.method} cannot come after {sparse[0]}: it "
                "slices weights, which would break the pattern of their zeros",
                f"trim first, then sparsify: put {stage.method} before {sparse[0]}",
            )


def _data(document: Document) -> dict[str, list[str]]:
    raw = document.data.get("data")
    raw = {} if raw is None else raw
    found = {}
    for key, value in (raw if isinstance(raw, dict) else {"train": raw}).items():
        if key not in DATA_KEYS:
            raise CompressError(
                f"{document.where(('data', key))}unknown key '{key}'{nearest(key, DATA_KEYS)}",
                f"keys of data: {', '.join(DATA_KEYS)}",
            )
        sources = value if isinstance(value, list) else [] if value is None else [value]
        for source in sources:
            path = ("data", key) if isinstance(raw, dict) else ("data",)
            document.expect(path, source, str, f'{key}: ["FILE"]')
        found[key] = sources
    return found


def _measures(document: Document) -> dict[str, Any]:
    raw = document.data.get("measures")
    items = list(DEFAULT_MEASURES) if raw is None else raw
    if isinstance(items, dict):
        items = [{k: v} for k, v in items.items()]
    document.expect(("measures",), items, list, f"measures: [{', '.join(DEFAULT_MEASURES)}]")
    found: dict[str, Any] = {}
    for i, item in enumerate(items):
        path = ("measures",) if isinstance(raw, dict) else ("measures", i)
        where, known = document.where(path), method_names("measure")
        if isinstance(item, dict) and len(item) != 1:
            raise CompressError(
                f"{where}a measure is one NAME with its options", "- fidelity: {rows: 512}"
            )
        name, given = next(iter(item.items())) if isinstance(item, dict) else (item, None)
        if name not in known:
            raise CompressError(
                f"{where}unknown measure '{name}'{nearest(name, known)}",
                f"measures: {', '.join(known)}",
            )
        module = load_method(f"measure.{name}", where)
        given = {} if given is None else given
        found[name] = make_options(module.Options, given, document, (*path, name))
    return found


def _floor(document: Document) -> dict[str, float]:
    raw = document.data.get("floor")
    raw = {} if raw is None else raw
    document.expect(("floor",), raw, dict, "floor: {cosine: 0.9}")
    for key, value in raw.items():
        where = document.where(("floor", key))
        if key not in QUALITY_KEYS:
            raise CompressError(
                f"{where}unknown quality '{key}'{nearest(key, QUALITY_KEYS)}",
                f"floors: {', '.join(QUALITY_KEYS)}",
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CompressError(f"{where}floor of {key} must be a number", f"{key}: 0.9")
    return {k: float(v) for k, v in raw.items()}
