"""How a method declares its options, and how a typo finds the name that was meant."""

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def options(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only pydantic dataclass that refuses unknown keys.

    Bounds and help texts are written with `pydantic.Field(default, ge=..., description=...)`.
    """
    config = ConfigDict(extra="forbid", validate_default=True)
    return cast("type[T]", dataclass(frozen=True, kw_only=True, config=config)(cls))


def nearest(name: str, known: Iterable[Any]) -> str:
    """Return "; did you mean X?" for the closest known name, or "" when nothing is close."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
