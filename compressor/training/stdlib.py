"""The English that every CPython carries: help topics and docstrings, parsed and never imported.

stdlib:pydoc_data.topics   one document per topic of help()
stdlib:MODULE              the docstrings of a module or package, one document per file
stdlib:*                   the docstrings of the whole standard library
"""

import ast
import sys
import sysconfig
from pathlib import Path

from compressor.errors import CompressError
from compressor.options import nearest

PREFIX = "stdlib:"
_TOPICS = "pydoc_data.topics"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def stdlib_texts(module: str) -> list[str]:
    """Documents of `module` ("*" for all), in the same order on every machine.

    Raises:
        CompressError: there is no such module, or it has no docstrings.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    if module == _TOPICS:
        return _topics(root / "pydoc_data" / "topics.py")
    texts = [_docstrings(file) for file in _files(root, module)]
    found = [text for text in texts if text]
    if not found:
        raise CompressError(f"'{PREFIX}{module}' has no docstrings", f"--data '{PREFIX}*'")
    return found


def _files(root: Path, module: str) -> list[Path]:
    place = root / module.replace(".", "/") if module != "*" else root
    if place.with_suffix(".py").is_file() and module != "*":
        return [place.with_suffix(".py")]
    if not all(part.isidentifier() for part in module.split(".")) and module != "*":
        raise CompressError(f"'{PREFIX}{module}' is no module name", f"--data {PREFIX}{_TOPICS}")
    if not place.is_dir():
        raise CompressError(
            f"the standard library has no Python module '{module}'"
            f"{nearest(module, sys.stdlib_module_names)}",
            f"--data {PREFIX}{_TOPICS}",
        )
    inner = ((file.relative_to(root), file) for file in place.rglob("*.py"))
    kept = [(name.as_posix(), file) for name, file in inner if not _LEFT_OUT & set(name.parts)]
    return [file for _, file in sorted(kept)]


def _topics(file: Path) -> list[str]:
    """The values of the literal `topics = {...}`."""
    (table,) = (
        node.value for node in ast.parse(file.read_bytes()).body if isinstance(node, ast.Assign)
    )
    topics: dict[str, str] = ast.literal_eval(table)
    return [topics[name] for name in sorted(topics)]


def _docstrings(file: Path) -> str:
    """Every docstring of a file, separated by blank lines, in the order of the source."""
    nodes = [n for n in ast.walk(ast.parse(file.read_bytes())) if isinstance(n, _DOCUMENTED)]
    nodes.sort(key=lambda node: 0 if isinstance(node, ast.Module) else node.lineno)
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes)))
