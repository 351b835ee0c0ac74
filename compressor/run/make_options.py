"""Options of a method from plain data; the first mistake is named with line and nearest name."""

import dataclasses
from typing import Any

from pydantic import ValidationError

from compressor.errors import CompressError
from compressor.options import nearest
from compressor.run.yaml_lines import Document


def make_options(cls: Any, given: Any, document: Document, path: tuple[Any, ...]) -> Any:
    """Build validated options, pointing at the line of the first mistake."""
    document.expect(path, given, dict, f"{path[-1]}: {{option: value}}")
    try:
        return cls(**given)
    except CompressError as error:
        raise CompressError(f"{document.where(path)}{error.what}", error.hint) from error
    except TypeError as error:
        raise CompressError(f"{document.where(path)}{error}", "option names are text") from error
    except ValidationError as error:
        raise _explain(error, cls, document, path) from error


def _explain(
    error: ValidationError, cls: Any, document: Document, path: tuple[Any, ...]
) -> CompressError:
    # an option that is missing may be the one whose name is misspelt
    first = min(error.errors(), key=lambda found: found["type"] == "missing")
    keys = tuple(first["loc"])
    method = f"measure.{path[-1]}" if path[0] == "measures" else path[-1]
    if not keys:
        return _explain_whole(first, document, path, method)
    where, name = document.where((*path, *keys)), ".".join(str(k) for k in keys)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_options(cls, keys[:-1])
        return CompressError(
            f"{where}unknown option '{name}' of {method}{nearest(str(keys[-1]), known)}",
            f"options: {', '.join(known)}",
        )
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] == "missing" else f" (got {first['input']!r})"
    return CompressError(
        f"{where}option '{name}' of {method}: {message}{value}",
        f"compress methods {method} lists the options",
    )


def _explain_whole(
    first: Any, document: Document, path: tuple[Any, ...], method: str
) -> CompressError:
    """A mistake of no single option: of how they go together."""
    given = document.overrides_below(path)
    hint = f"compress methods {method} lists the options"
    if first["type"] == "exactly_one":
        found = [(*path, name) for name in first["ctx"]["found"]]
        given = {key: text for key, text in given.items() if key in found}
        others = [key for key in found if key not in given]
        if given and others and path[0] == "stages":  # the profile gives another one
            hint = "add " + " ".join(f"--set stages.{k[1] + 1}.{k[-1]}=null" for k in others)
    where = f"--set {[*given.values()][-1]}: " if given else document.where(path)
    message = first["msg"].removeprefix("Value error, ")
    return CompressError(f"{where}{method}: {message}", hint)


def _known_options(cls: Any, path: tuple[Any, ...]) -> list[str]:
    for key in path:
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        members = getattr(kinds.get(str(key)), "__args__", None) or (kinds.get(str(key)),)
        cls = next((m for m in members if dataclasses.is_dataclass(m)), cls)
    return [f.name for f in dataclasses.fields(cls)]
