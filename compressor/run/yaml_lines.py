"""YAML that remembers on which line every key stands, so that mistakes can be pointed at."""

from dataclasses import dataclass
from typing import Any

import yaml

from compressor.errors import CompressError

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Document:
    """Plain data of a YAML file and the line of every key path, for messages."""

    data: Any
    lines: dict[Path, int]
    name: str

    def where(self, path: Path) -> str:
        """Return "file:line: " of a key path or of its nearest parent that has a line."""
        while path and path not in self.lines:
            path = path[:-1]
        line = self.lines.get(path)
        return f"{self.name}:{line}: " if line else f"{self.name}: "


def read_yaml(text: str, name: str) -> Document:
    """Parse YAML; duplicate keys are refused.

    Raises:
        CompressError: the text is no valid YAML; names the line.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise CompressError(
            f"{name}:{line}: not valid YAML ({error.problem})", "check indentation and colons"
        ) from error
    except yaml.YAMLError as error:
        raise CompressError(
            f"{name}: not valid YAML ({error})", "write it as UTF-8 text"
        ) from error
    lines: dict[Path, int] = {}
    data = _plain(node, (), lines, name) if node else {}
    return Document(data, lines, name)


def _plain(node: yaml.Node, path: Path, lines: dict[Path, int], name: str) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = yaml.SafeLoader("").construct_object(key_node)
            line = key_node.start_mark.line + 1
            if key in found:
                raise CompressError(f"{name}:{line}: '{key}' stands twice", "remove one of them")
            lines[(*path, key)] = line
            found[key] = _plain(value_node, (*path, key), lines, name)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), lines, name) for i, item in enumerate(node.value)]
    return yaml.SafeLoader("").construct_object(node)
