"""Plain transformers: whatever `from_pretrained` makes of a directory, in float32 on the CPU."""

from pathlib import Path

import torch

from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError, first_line
from compressor.model.checkpoint import load_processor, read_pooling
from compressor.model.families import find_family
from compressor.model.model import Model
from compressor.model.shapes import config_of, model_class
from compressor.model.sources import read_config, weight_files


class TransformersEngine(TorchEngine):
    """A directory in the layout of compressed-tensors; none of our loading code reads it.

    Args:
        path: such a directory.
        threads: as for TorchEngine.

    Raises:
        CompressError: transformers does not load it, or not all of it.
    """

    name = "transformers"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.path = Path(path)
        raw = read_config(self.path, own=True)
        family = find_family(raw["model_type"])
        weight_files(self.path)
        try:
            module, report = model_class(family, config_of(raw)).from_pretrained(
                self.path, output_loading_info=True, dtype=torch.float32, local_files_only=True
            )
        except Exception as error:  # of whatever kind: two libraries read what a user may edit
            raise CompressError(
                f"transformers cannot load '{self.path.name}': {first_line(error)}",
                "export it again",
            ) from error
        if report["unexpected_keys"] or report["mismatched_keys"]:
            raise CompressError(
                f"transformers does not load all of '{self.path.name}'", "export it again"
            )
        module.eval()
        processor, pooling = load_processor(self.path), read_pooling(self.path)
        self.model = Model(module, family, processor, pooling=pooling)
