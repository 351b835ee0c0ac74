"""What the core may say while it works. The CLI draws it; a library user hears nothing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Screen(Protocol):
    """Where progress goes. `advance(n)` of a progress bar adds n finished units."""

    def say(self, text: str) -> None: ...

    def progress(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]: ...


class Silent:
    """A screen that shows nothing: the default of the Python API and of tests."""

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda n: None
