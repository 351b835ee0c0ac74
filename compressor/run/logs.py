"""Library chatter goes to log.txt, never to the screen."""

import contextlib
import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

QUIET = ("transformers", "torch", "onnxscript", "onnx_ir", "onnxruntime", "huggingface_hub")


class _Lines(io.TextIOBase):
    """A text stream that writes what libraries print into the log."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()


@contextlib.contextmanager
def logged(file: Path) -> Iterator[Callable[[str], None]]:
    """Send logging, warnings and the prints of libraries to `file`; yield `log(text)`.

    The screen of the CLI holds the real streams and is not touched.
    """
    with file.open("a", encoding="utf-8", buffering=1) as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        root = logging.getLogger()
        before = list(root.handlers)
        root.handlers = [handler]
        _hush_transformers()

        def log(text: str) -> None:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

        try:
            lines = _Lines(stream)
            with (
                contextlib.redirect_stdout(lines),
                contextlib.redirect_stderr(lines),
                warnings.catch_warnings(),
            ):
                logging.captureWarnings(True)
                yield log
        finally:
            root.handlers = before
            logging.captureWarnings(False)


def _hush_transformers() -> None:
    from transformers.utils import logging as chatter

    chatter.disable_progress_bar()
    chatter.disable_default_handler()
    chatter.enable_propagation()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in QUIET:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if isinstance(handler, logging.StreamHandler):
                logger.removeHandler(handler)
