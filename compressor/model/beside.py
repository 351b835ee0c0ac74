"""Tensors that a stage leaves beside the weights: a safetensors file that says what it is.

The file belongs to its stage and is never copied into a later one. Its header holds one text, so
that the same content always has the same bytes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressor.errors import CompressError
from compressor.model.sources import check_safetensors

_KEY = "about"


@dataclass(frozen=True)
class TensorFile:
    """Named tensors, and what a reader must know about them, as JSON values."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    def write(self, file: Path) -> None:
        """Write the file; no dtype is changed."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, file, {_KEY: json.dumps(self.about, sort_keys=True)})

    @classmethod
    def read(cls, file: Path) -> "TensorFile":
        """Read a file of `write`.

        Raises:
            CompressError: the file is damaged, or says nothing about itself.
        """
        check_safetensors(file)
        with safe_open(file, "pt") as opened:
            about = (opened.metadata() or {}).get(_KEY)
            if about is None:
                raise CompressError(
                    f"'{file.name}' does not say what it holds", "name a file that a stage wrote"
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return cls(tensors, json.loads(about))
