"""YAML that remembers on which line every key stands, so that mistakes can be pointed at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from compressor.errors import CompressError

Path = tuple[Any, ...]
_KINDS = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false"}
_NUMBERS, _TEXT = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"), "tag:yaml.org,2002:str"
_CONTAINERS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class Loader(yaml.SafeLoader):
    """A safe loader to whom 2:4 is a text; to YAML 1.1 it is 124, in base 60."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        """The tag of a node."""
        found = super().resolve(kind, value, implicit)
        if kind is yaml.ScalarNode and found in _NUMBERS and ":" in value:
            return _TEXT
        return found


@dataclass(frozen=True)
class Document:
    """Plain data of a YAML file and the line of every key path, for messages."""

    data: Any
    lines: dict[Path, int]
    name: str
    overrides: Mapping[Path, str] = field(default_factory=dict)  # {key path: "KEY=VALUE"}

    def where(self, path: Path) -> str:
        """Return "file:line: " of a key path or of its nearest parent that has a line.

        Where the command line gave the value, its --set is named instead.
        """
        for end in range(len(path), 0, -1):
            if path[:end] in self.overrides:
                return f"--set {self.overrides[path[:end]]}: "
        while path and path not in self.lines:
            path = path[:-1]
        line = self.lines.get(path)
        return f"{self.name}:{line}: " if line else f"{self.name}: "

    def overrides_below(self, path: Path) -> dict[Path, str]:
        """{key path: "KEY=VALUE"} of what the command line gave of a mapping."""
        return {p: text for p, text in self.overrides.items() if p[: len(path)] == path}

    def expect(self, path: Path, value: Any, kind: type, example: str) -> None:
        """Refuse a value that is no dict, list, str or bool, as `kind` says.

        Raises:
            CompressError: names the key and its line, with `example` as the hint.
        """
        if not isinstance(value, kind):
            raise CompressError(
                f"{self.where(path)}'{path[-1]}' must be {_KINDS[kind]} (got {value!r})", example
            )


def read_yaml(text: str, name: str) -> Document:
    """Parse YAML; duplicate keys, merge keys and tags are refused.

    Raises:
        CompressError: the text is no valid YAML; names the line.
    """
    try:
        node = yaml.compose(text, Loader=Loader)
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
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, name)
    if node.tag not in _CONTAINERS:
        raise _no_plain(node, name)
    if isinstance(node, yaml.MappingNode):
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = _scalar(key_node, name)
            line = key_node.start_mark.line + 1
            if key in found:
                raise CompressError(f"{name}:{line}: '{key}' stands twice", "remove one of them")
            lines[(*path, key)] = line
            found[key] = _plain(value_node, (*path, key), lines, name)
        return found
    return [_plain(item, (*path, i), lines, name) for i, item in enumerate(node.value)]


def _scalar(node: yaml.Node, name: str) -> Any:
    """Text, number, truth value, date or None of a node that has no parts."""
    if not isinstance(node, yaml.ScalarNode):
        raise _no_plain(node, name)
    try:
        return Loader("").construct_object(node)
    except (yaml.YAMLError, ValueError, LookupError) as error:  # unknown tag, no such number
        raise _no_plain(node, name) from error


def _no_plain(node: yaml.Node, name: str) -> CompressError:
    shown = f"'{node.value}'" if isinstance(node, yaml.ScalarNode) else "a list or mapping"
    kind = node.tag.rpartition(":")[2]
    return CompressError(
        f"{name}:{node.start_mark.line + 1}: {shown} cannot be read as '{kind}' here",
        "write plain keys and values: no tags (!x), no merge keys (<<); quote texts",
    )
