"""Measures before they run: their options, whether they fit the model, and what they read."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from compressor.errors import CompressError
from compressor.model.checkpoint import read_task
from compressor.model.manifest import file_digest
from compressor.run.make_options import make_options
from compressor.run.methods import load_method, method_names
from compressor.run.overrides import read_value
from compressor.run.yaml_lines import Document

SPEED = ("size", "latency", "memory")  # of every model, and no quality


def measure_options(names: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """{name: options} of measures.

    Args:
        names: of measures that exist.
        overrides: "NAME.OPTION=VALUE", values read as YAML.

    Raises:
        CompressError: an override is malformed or of a measure that is not named; an option is
            unknown, out of range or missing.
    """
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    said: dict[tuple[Any, ...], str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        name, dot, option = key.partition(".")
        if not (equals and dot and option):
            raise CompressError(
                f"--set '{text}' is no MEASURE.OPTION=VALUE", "--set perplexity.length=256"
            )
        if name not in given:
            raise CompressError(
                f"--set '{text}': {name} is not measured here ({', '.join(given)})",
                f"add --measure {name}",
            )
        given[name][option] = read_value(text, value)
        said["measures", name, option] = text
    document = Document({"measures": given}, {}, "--measure", said)
    return {
        name: make_options(
            load_method(f"measure.{name}").Options, values, document, ("measures", name)
        )
        for name, values in given.items()
    }


def refuse_unfit(measures: Mapping[str, Any], path: Path) -> None:
    """Refuse measures that could not work, before anything is computed.

    Args:
        measures: {name: options}.
        path: directory of a model; the others of a comparison have its task.

    Raises:
        CompressError: a measure is for other tasks; or what its own `check` finds, such as a file
            that is missing or a library that is not installed.
    """
    task = read_task(path)
    for name, options in measures.items():
        module = load_method(f"measure.{name}")
        tasks = getattr(module, "TASKS", (task,))
        if task not in tasks:
            raise CompressError(
                f"the measure {name} is for {' and '.join(tasks)}, and this model is for {task}",
                f"leave {name} out of measures; these fit: {', '.join(fitting(task))}",
            )
        if hasattr(module, "check"):
            module.check(options, path)


def fitting(task: str) -> list[str]:
    """Names of the measures of quality that a task has."""
    modules = {name: load_method(f"measure.{name}") for name in method_names("measure")}
    return [
        name
        for name, module in modules.items()
        if name not in SPEED and task in getattr(module, "TASKS", (task,))
    ]


def plain_options(options: Any) -> dict[str, Any]:
    """Options as JSON has them; a file or folder is {name, sha256}, so that its content counts."""
    found = TypeAdapter(type(options)).dump_python(options, mode="json")
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, Path):
            found[field.name] = {"name": value.name, "sha256": _digest(value)}
    return found


def own_data(measures: Mapping[str, Mapping[str, Any]]) -> str:
    """What measures read instead of held-out documents, in a sentence; "" where none does.

    Args:
        measures: {name: plain options}, as `bench --json` has them.
    """
    said = []
    for name, options in measures.items():
        files = [value["name"] for value in options.values() if _is_file(value)]
        if found := options.get("tasks") or files:
            said.append(f"{name} is measured on {', '.join(found)}")
    return f"{'; '.join(said)}, not on these documents." if said else ""


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"name", "sha256"}


def _digest(path: Path) -> str:
    """Of a file, or of the names and contents of all files below a folder."""
    if path.is_file():
        return file_digest(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    parts = [f"{file.relative_to(path).as_posix()} {file_digest(file)}\n" for file in files]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
