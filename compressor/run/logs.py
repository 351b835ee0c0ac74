"""Library chatter goes to log.txt, never to the screen."""

import contextlib
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path


class _Lines(io.TextIOBase):
    """A text stream that writes what libraries print into the log, without a buffer.

    A buffer that a full disk refuses would be offered again at every later write, and on closing.
    """

    def __init__(self, stream: io.FileIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text.encode("utf-8", "replace"))
        return len(text)

    def fileno(self) -> int:
        return self.stream.fileno()


@contextlib.contextmanager
def logged(file: Path) -> Iterator[Callable[[str], None]]:
    """Send logging, warnings and the prints of libraries to `file`; yield `log(text)`.

    The screen of the CLI holds the real streams and is not touched.
    """
    with io.FileIO(file, "a") as stream:
        lines = _Lines(stream)

        def log(text: str) -> None:
            lines.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

        with (
            _handlers_to(lines),
            contextlib.redirect_stdout(lines),
            contextlib.redirect_stderr(lines),
            warnings.catch_warnings(),
        ):
            warnings.showwarning = lambda message, kind, *_: log(f"{kind.__name__}: {message}")
            yield log


@contextlib.contextmanager
def _handlers_to(lines: io.TextIOBase) -> Iterator[None]:
    """Point every existing log handler that writes to the terminal at the log for a while.

    torch and transformers make theirs when imported, with the stderr of that moment. A handler that
    asks for the stderr of every moment, as `logging.lastResort` does, follows by itself.
    """
    from transformers.utils import logging as chatter

    chatter.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    known = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    handlers = [h for logger in [logging.root, *known] for h in logger.handlers]
    terminal = [
        h
        for h in handlers
        if isinstance(h, logging.StreamHandler)
        and "stream" in vars(h)
        and h.stream in (sys.stderr, sys.__stderr__)
    ]
    before = [(handler, handler.stream) for handler in terminal]
    for handler in terminal:
        handler.setStream(lines)
    try:
        yield
    finally:
        for handler, stream in before:
            handler.setStream(stream)
