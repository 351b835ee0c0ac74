"""A profile: the YAML recipe of a run, with every option validated before anything is loaded."""

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from compressor.errors import CompressError
from compressor.options import nearest
from compressor.run.methods import KINDS, load_method, method_names
from compressor.run.overrides import apply_overrides
from compressor.run.yaml_lines import Document, read_yaml

DATA_KEYS = ("train", "calibration", "validation", "heldout")
DEFAULT_MEASURES = ("size", "latency", "memory", "fidelity")
QUALITY_KEYS = ("accuracy", "spearman", "top1_agreement", "cosine")


@dataclass(frozen=True)
class Stage:
    """One step of the chain: a method with validated options."""

    kind: str
    name: str
    options: Any
    teacher: str | None = None
    seed: int | None = None

    @property
    def method(self) -> str:
        """`kind.name`, which is also the path of the method's file."""
        return f"{self.kind}.{self.name}"

    def plain_options(self) -> dict[str, Any]:
        """Options with every default filled in, as plain JSON values."""
        return TypeAdapter(type(self.options)).dump_python(self.options, mode="json")


@dataclass(frozen=True)
class Profile:
    """A validated recipe. `text` is the resolved YAML: every default written out."""

    name: str
    stages: tuple[Stage, ...]
    description: str = ""
    model: str | None = None
    teacher: str = "input"
    data: dict[str, list[str]] = field(default_factory=dict)
    seed: int = 0
    dtype: str | None = None  # of saved checkpoints; None keeps the dtype of the source
    keep: str = "all"
    measures: dict[str, Any] = field(default_factory=dict)  # {measure name: options}
    baselines: dict[str, tuple[Stage, ...]] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)  # {quality key: lowest allowed}
    text: str = ""


KEYS = tuple(f.name for f in dataclasses.fields(Profile) if f.name != "text")


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    folder = resources.files("compressor.profiles")
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_profile(profile: str | Path, overrides: tuple[str, ...] = ()) -> Profile:
    """Load a profile by path or shipped name and validate all of it.

    Args:
        profile: path of a YAML file, or the name of a shipped profile.
        overrides: "stages.N.KEY=VALUE" or "KEY=VALUE" texts, N from 1.

    Raises:
        CompressError: with file:line and the nearest valid name.
    """
    text, name = _read(profile)
    document = read_yaml(text, name)
    if not isinstance(document.data, dict):
        raise CompressError(f"{name}: a profile is a mapping of keys", f"keys: {', '.join(KEYS)}")
    return _validate(apply_overrides(document, overrides))


def _read(profile: str | Path) -> tuple[str, str]:
    path = Path(profile)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return path.read_text(encoding="utf-8"), path.name
        except UnicodeDecodeError as error:
            raise CompressError(f"{path} is not UTF-8 text", "save it as UTF-8") from error
        except OSError as error:
            raise CompressError(
                f"profile '{profile}' cannot be read ({error.strerror})",
                f"give a YAML file or one of: {', '.join(shipped_profiles())}",
            ) from error
    known = shipped_profiles()
    if str(profile) not in known:
        raise CompressError(
            f"unknown profile '{profile}'{nearest(str(profile), known)}",
            f"give a YAML file or one of: {', '.join(known)}",
        )
    file = resources.files("compressor.profiles") / f"{profile}.yaml"
    return file.read_text(encoding="utf-8"), f"{profile}.yaml"


def _validate(document: Document) -> Profile:
    raw = document.data
    for key in raw:
        if key not in KEYS:
            raise CompressError(
                f"{document.where((key,))}unknown key '{key}'{nearest(key, KEYS)}",
                f"keys of a profile: {', '.join(KEYS)}",
            )
    choose(document, "keep", ("all", "last"))
    choose(document, "dtype", (None, "float32", "bfloat16"))
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise CompressError(f"{document.where(('seed',))}seed must be a whole number >= 0", "seed: 0")
    stages = _stages(document, ("stages",), raw.get("stages"))
    check_order(document, stages)
    baselines = raw.get("baselines") or {}
    profile = Profile(
        name=str(raw.get("name") or Path(document.name).stem),
        description=" ".join(str(raw.get("description") or "").split()),
        model=raw.get("model"),
        teacher=raw.get("teacher") or "input",
        data=_data(document),
        seed=seed,
        dtype=raw.get("dtype"),
        keep=raw.get("keep") or "all",
        stages=stages,
        measures=_measures(document),
        baselines={k: _stages(document, ("baselines", k), v) for k, v in baselines.items()},
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
    rest = dict(given or {})
    teacher, seed = rest.pop("teacher", None), rest.pop("seed", None)
    options = make_options(module.Options, rest, document, (*path, method))
    return Stage(kind, name, options, teacher, seed)


def make_options(cls: Any, given: Any, document: Document, path: tuple[Any, ...]) -> Any:
    """Build validated options, pointing at the line of the first mistake."""
    if not isinstance(given, dict):
        raise CompressError(f"{document.where(path)}options must be a mapping", "{key: value}")
    try:
        return cls(**given)
    except CompressError as error:
        raise CompressError(f"{document.where(path)}{error.what}", error.hint) from error
    except (ValidationError, TypeError) as error:
        if isinstance(error, TypeError):
            raise CompressError(f"{document.where(path)}{error}", "option names are text") from error
        raise _explain(error, cls, document, path) from error


def _explain(
    error: ValidationError, cls: Any, document: Document, path: tuple[Any, ...]
) -> CompressError:
    first = error.errors()[0]
    keys = tuple(first["loc"])
    where, name = document.where((*path, *keys)), ".".join(str(k) for k in keys)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_options(cls, keys[:-1])
        return CompressError(
            f"{where}unknown option '{name}' of {path[-1]}{nearest(keys[-1], known)}",
            f"options: {', '.join(known)}",
        )
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] == "missing" else f" (got {first['input']!r})"
    return CompressError(
        f"{where}option '{name}' of {path[-1]}: {message}{value}",
        f"compress methods {path[-1]} lists the options",
    )


def _known_options(cls: Any, path: tuple[Any, ...]) -> list[str]:
    for key in path:
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        members = getattr(kinds.get(str(key)), "__args__", None) or (kinds.get(str(key)),)
        cls = next((m for m in members if dataclasses.is_dataclass(m)), cls)
    return [f.name for f in dataclasses.fields(cls)]


def check_order(document: Document, stages: tuple[Stage, ...]) -> None:
    """Prune, distill and search come first, then at most one quantize, then exports."""
    order = {"prune": 0, "distill": 0, "search": 0, "quantize": 1, "export": 2}
    for i, (before, after) in enumerate(zip(stages, stages[1:], strict=False), start=1):
        where = document.where(("stages", i))
        if before.kind == after.kind == "quantize":
            raise CompressError(f"{where}a second quantize stage", "keep one of them")
        if order[after.kind] < order[before.kind]:
            raise CompressError(
                f"{where}{after.method} cannot come after {before.method}",
                "order: prune/distill/search, then one quantize, then exports",
            )


def _data(document: Document) -> dict[str, list[str]]:
    raw = document.data.get("data") or {}
    if not isinstance(raw, dict):
        raw = {"train": raw}
    for key in raw:
        if key not in DATA_KEYS:
            raise CompressError(
                f"{document.where(('data', key))}unknown key '{key}'{nearest(key, DATA_KEYS)}",
                f"keys of data: {', '.join(DATA_KEYS)}",
            )
    return {k: [str(s) for s in (v if isinstance(v, list) else [v])] for k, v in raw.items()}


def _measures(document: Document) -> dict[str, Any]:
    raw = document.data.get("measures")
    items = list(DEFAULT_MEASURES) if raw is None else raw
    if isinstance(items, dict):
        items = [{k: v} for k, v in items.items()]
    found: dict[str, Any] = {}
    for i, item in enumerate(items):
        name, given = next(iter(item.items())) if isinstance(item, dict) else (item, {})
        known = method_names("measure")
        where = document.where(("measures", i))
        if name not in known:
            raise CompressError(
                f"{where}unknown measure '{name}'{nearest(name, known)}",
                f"measures: {', '.join(known)}",
            )
        module = load_method(f"measure.{name}", where)
        found[name] = make_options(module.Options, dict(given or {}), document, ("measures", i, name))
    return found


def _floor(document: Document) -> dict[str, float]:
    raw = document.data.get("floor") or {}
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


def resolved_text(profile: Profile) -> str:
    """YAML of a profile with every default written out; loading it gives the same profile."""

    def stage(item: Stage) -> dict[str, Any]:
        extra = {"teacher": item.teacher, "seed": item.seed}
        kept = {key: value for key, value in extra.items() if value is not None}
        return {item.method: item.plain_options() | kept}

    content = {key: getattr(profile, key) for key in KEYS}
    content["stages"] = [stage(s) for s in profile.stages]
    content["baselines"] = {k: [stage(s) for s in v] for k, v in profile.baselines.items()}
    content["measures"] = [
        {k: TypeAdapter(type(v)).dump_python(v, mode="json")} for k, v in profile.measures.items()
    ]
    kept = {k: v for k, v in content.items() if v not in (None, {}, "", [])}
    return yaml.safe_dump(kept, sort_keys=False, width=100)
