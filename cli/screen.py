"""What a run shows while it works: bars on a terminal, one plain line per task elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from compressor.run.tables import clock


class RichScreen:
    """The `Screen` of the command line; everything goes to stderr.

    The stream is held from the start, because a run redirects sys.stderr into its log.
    """

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        self._bars = self._console.is_terminal and not self._console.is_dumb_terminal
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """One line, above any bar."""
        self._console.print(Text(text), soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar with percent, elapsed and remaining time while the block runs."""
        if not self._bars:
            self.say(f"  {label}")
            yield lambda n: None
            return
        begin = time.perf_counter()
        with self._live() as progress:
            task = progress.add_task(label, total=total)
            try:
                yield lambda n: progress.advance(task, n)
            finally:
                progress.remove_task(task)
        self.say(f"  {label}  {clock(time.perf_counter() - begin)}")

    @contextmanager
    def _live(self) -> Iterator[Progress]:
        """The one live display; a bar inside another joins it."""
        if self._progress is not None:
            yield self._progress
            return
        with _new_progress(self._console) as self._progress:
            try:
                yield self._progress
            finally:
                self._progress = None


def _new_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
        speed_estimate_period=120,
        redirect_stdout=False,
        redirect_stderr=False,
    )
