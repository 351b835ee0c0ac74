"""How a method declares its options, and how a typo finds the name that was meant."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def options(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only pydantic dataclass that refuses unknown keys.

    Bounds and help texts are written with `pydantic.Field(default, ge=..., description=...)`.
    """
    config = ConfigDict(extra="forbid", validate_default=True)
    return cast("type[T]", dataclass(frozen=True, kw_only=True, config=config)(cls))


def exactly_one(given: Any, names: Sequence[str]) -> None:
    """Refuse options that give none of `names`, or several; for a validator of the whole.

    Raises:
        PydanticCustomError: of type "exactly_one"; its context holds the names that are given.
    """
    found = [name for name in names if getattr(given, name) is not None]
    if len(found) != 1:
        raise PydanticCustomError(
            "exactly_one",
            "give exactly one of {names} (got {got})",
            {
                "names": f"{', '.join(names[:-1])} and {names[-1]}",
                "got": " and ".join(found) or "none",
                "found": found,
            },
        )


def nearest(name: str, known: Iterable[Any]) -> str:
    """Return "; did you mean X?" for the closest known name, or "" when nothing is close."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
