"""Keep the chatter of transformers, torch.onnx and ONNX Runtime off the screen."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def quiet() -> Iterator[None]:
    """Send whatever libraries print inside the block to a file that is deleted after it.

    Only for commands without an output directory; a run keeps its chatter in OUT/log.txt.
    """
    from compressor.run.logs import logged

    with tempfile.TemporaryDirectory() as directory, logged(Path(directory) / "log.txt"):
        yield
