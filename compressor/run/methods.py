"""Find and describe methods. `prune.minitron` in a profile is the file prune/minitron.py."""

import ast
import dataclasses
import hashlib
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from pydantic import TypeAdapter

import compressor
from compressor.errors import CompressError
from compressor.options import nearest

KINDS = ("prune", "distill", "search", "quantize", "export")
ROOT = Path(compressor.__file__).parent
RUNNER = "distill/runner.py"  # trains for every method that does
# What a stage asks for besides its parent counts in its fingerprint. A method is taken to read
# data unless it is named here; distill methods have a teacher and others have none.
WITHOUT_DATA = ("prune.magnitude", "quantize.rtn", "quantize.nf4")
WITHOUT_TEACHER = ("distill.ce",)
WITH_TEACHER = (
    "prune.ast",
    "prune.squarehead",
    "quantize.distilled",
    "quantize.differentiable",
    "quantize.qsd",
)


def method_names(kind: str) -> list[str]:
    """Names of the method files of a kind: those that define `Options`."""
    return [f.stem for f in sorted((ROOT / kind).glob("*.py")) if _defines_options(f)]


def _defines_options(file: Path) -> bool:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.ClassDef) and node.name == "Options" for node in tree.body)


def all_methods() -> list[str]:
    """Every `kind.name` that a profile's stages may use."""
    return [f"{kind}.{name}" for kind in KINDS for name in method_names(kind)]


def load_method(method: str, where: str = "") -> ModuleType:
    """Import the file of `kind.name`.

    Raises:
        CompressError: there is no such file; names the nearest.
    """
    kind, _, name = method.partition(".")
    if kind not in (*KINDS, "measure") or name not in method_names(kind):
        known = all_methods()
        raise CompressError(
            f"{where}unknown method '{method}'{nearest(method, known)}",
            "compress methods lists what there is",
        )
    return importlib.import_module(f"compressor.{kind}.{name}")


def learns(method: str) -> bool:
    """Whether a method learns from a teacher."""
    if method.startswith("distill."):
        return method not in WITHOUT_TEACHER
    return method in WITH_TEACHER


def method_hash(module: ModuleType) -> str:
    """sha256 of a method: its file, the runner if it trains, and what these import of KINDS."""
    assert module.__file__
    file = Path(module.__file__)
    root, files = file.parent.parent, [file]
    if any(field.name == "train" for field in dataclasses.fields(module.Options)):
        files.append(root / RUNNER)
    total = hashlib.sha256()
    for each in files_of(root, files):
        name = each.relative_to(root).as_posix()
        total.update(f"{name} {hashlib.sha256(each.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def files_of(root: Path, files: list[Path]) -> list[Path]:
    """Files and all they import from the folders of KINDS, directly or not; nothing is run.

    Args:
        root: the folder of the package `compressor`.
    """
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        current = waiting.pop()
        if current.is_file() and current not in found:
            found.add(current)
            waiting += (root / f"{name.replace('.', '/')}.py" for name in _imports(current))
    return sorted(found)


def _imports(file: Path) -> set[str]:
    """Names, as KIND.NAME, that a file imports from KINDS: modules, and what is in them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}", *(f"{node.module}.{part.name}" for part in node.names)}
        elif isinstance(node, ast.Import):
            found |= {part.name for part in node.names}
    names = {name.removeprefix("compressor.") for name in found if name.startswith("compressor.")}
    return {name for name in names if name.partition(".")[0] in KINDS}


def describe(method: str) -> dict[str, Any]:
    """Name, paper, summary and options of a method, as `methods --json` prints them."""
    module = load_method(method)
    text = module.__doc__ or ""
    papers = re.findall(r"\b\d{4}\.\d{5}\b", text) if "arXiv" in text else []
    return {
        "name": method,
        "paper": ", ".join(dict.fromkeys(papers)) or None,
        "summary": text.strip().splitlines()[0],
        "options": describe_options(module.Options),
    }


def describe_options(cls: Any) -> dict[str, dict[str, Any]]:
    """{option: {type, default, description}} of an options class; nested ones are dotted."""
    found: dict[str, dict[str, Any]] = {}
    schema, types = TypeAdapter(cls).json_schema(), get_type_hints(cls)  # without constraints
    for field in dataclasses.fields(cls):
        entry = schema["properties"].get(field.name, {})
        nested = [t for t in _members(field.type) if dataclasses.is_dataclass(t)]
        if nested:
            own = entry.get("default") or {}  # may differ from those of the nested class
            for name, inner in describe_options(nested[0]).items():
                default = own.get(name, inner["default"])
                found[f"{field.name}.{name}"] = inner | {"default": default}
            continue
        found[field.name] = {
            "type": _type_text(types[field.name]),
            "default": entry.get("default"),
            "description": entry.get("description", ""),
        }
    return found


def _members(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", None) or (annotation,)


def _type_text(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = text.replace("typing.", "").replace("NoneType", "None")
    return re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)
