"""`--set stages.N.KEY=VALUE`: change a profile from the command line."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import yaml

from compressor.errors import CompressError
from compressor.run.yaml_lines import Document, Loader, Path


def apply_overrides(document: Document, overrides: tuple[str, ...]) -> Document:
    """Return the document with each "path=value" applied; values are read as YAML.

    Stages count from 1 and need not name their method: `stages.2.train.steps=10`.
    Unknown names are caught by the validation that follows.
    """
    data, given = deepcopy(document.data), {}
    for text in overrides:
        path, separator, value = text.partition("=")
        keys = path.split(".")
        if not separator or not all(keys):
            raise CompressError(f"--set '{text}' is no KEY=VALUE", "--set stages.2.train.steps=10")
        given[_assign(data, keys, read_value(text, value), text)] = text
    return replace(document, data=data, overrides=given)


def read_value(text: str, value: str) -> Any:
    """Read the value of "KEY=VALUE" as YAML; `text` is the whole of it, for the message."""
    try:
        return yaml.load(value, Loader=Loader)
    except yaml.YAMLError as error:
        raise CompressError(f"--set '{text}': the value is not valid YAML", "quote it") from error


def _assign(data: dict[str, Any], keys: list[str], value: Any, text: str) -> Path:
    """Put the value in its place; returns the path of its key in the document."""
    target, start = data, ()
    if keys[0] == "stages":
        target, start, keys = _stage_options(data, keys, text)
    for key in keys[:-1]:
        if not isinstance(target.get(key) or {}, dict):
            raise CompressError(f"--set '{text}': '{key}' holds no keys", "name a deeper key")
        target[key] = target.get(key) or {}
        target = target[key]
    target[keys[-1]] = value
    return (*start, *keys)


def _stage_options(
    data: dict[str, Any], keys: list[str], text: str
) -> tuple[dict[str, Any], Path, list[str]]:
    """The options that a --set changes, their place in the document, and the keys that are left."""
    stages = data.get("stages") or []
    stages = stages if isinstance(stages, list) else []
    if len(keys) < 3 or not keys[1].isdigit() or not 1 <= int(keys[1]) <= len(stages):
        raise CompressError(
            f"--set '{text}': stages are stages.1 to stages.{len(stages)}, then an option",
            "--set stages.2.train.steps=10",
        )
    index = int(keys[1]) - 1
    if isinstance(stages[index], str):
        stages[index] = {stages[index]: {}}
    method = next(iter(stages[index])) if isinstance(stages[index], dict) and stages[index] else ""
    options = (stages[index][method] or {}) if method else None
    if not isinstance(options, dict):
        raise CompressError(
            f"--set '{text}': stage {keys[1]} of the profile is no KIND.NAME with options",
            "- distill.kd: {temperature: 1}",
        )
    stages[index][method] = options
    return options, ("stages", index, method), keys[2:]
