"""A GGUF file read back into our own modules: what stands in it, computed by PyTorch in float32.

Nothing of llama.cpp is needed. Every tensor is dequantized by the library gguf, its rows go back to
where transformers has them, and every size in the metadata must be that of config.json. So names,
order of rows, codes and scales are proven; that llama.cpp computes the same is for the engine
`llama.cpp` to show.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError, first_line
from compressor.export.gguf_metadata import extra_tensors, metadata
from compressor.export.gguf_names import Place, library, places
from compressor.model.checkpoint import build, load_processor, read_pooling
from compressor.model.families import Family, find_family
from compressor.model.model import Model
from compressor.model.shapes import drop_extras
from compressor.model.sources import read_config

FILE = "model.gguf"
_HINT = "copy the directory again, or export it again"


class GgufEngine(TorchEngine):
    """An exported directory with model.gguf and config.json; see the module.

    Args:
        path: the directory.
        threads: as for TorchEngine.

    Raises:
        CompressError: gguf is not installed, the file is damaged, or a tensor or a size in it is
            not what config.json asks for; names the first.
    """

    name = "gguf"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.path = Path(path)
        raw = read_config(self.path, own=True)
        family = find_family(raw["model_type"])
        module: Any = build(raw, family)
        drop_extras(module, family, lambda _: True)
        reader = open_file(self.path / FILE)
        _check_metadata(reader, metadata(family, module.config))
        _fill(module, family, tensors_of(reader))
        processor, pooling = load_processor(self.path), read_pooling(self.path)
        self.model = Model(module.eval(), family, processor, pooling=pooling)


def open_file(file: Path) -> Any:
    """The library's reader of a file, mapped into memory.

    Raises:
        CompressError: gguf is not installed, or the file is missing or damaged.
    """
    gguf = library()
    if not file.is_file():
        raise CompressError(f"'{file.parent.name}' has no {file.name}", _HINT)
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # of whatever kind: the library trips over what was damaged
        raise CompressError(f"{file.name} is damaged: {first_line(error)}", _HINT) from error


def tensors_of(reader: Any) -> dict[str, Any]:
    """{name: the library's tensor}; `value` reads one."""
    return {tensor.name: tensor for tensor in reader.tensors}


def value(tensor: Any) -> Tensor:
    """A tensor of the file, dequantized by the library: float32, in a copy.

    Raises:
        CompressError: it holds what is no number.
    """
    with np.errstate(invalid="ignore"):  # looked for below
        found = library().quants.dequantize(tensor.data, tensor.tensor_type)
    result = torch.from_numpy(np.array(found, dtype=np.float32))
    if not bool(result.isfinite().all()):
        raise CompressError(f"'{tensor.name}' of {FILE} holds what is no number", _HINT)
    return result


def in_our_order(place: Place, stored: Tensor) -> Tensor:
    """What a tensor of the file is in memory."""
    if place.rows is not None:
        moved = torch.empty_like(stored)
        moved[place.rows] = stored
        stored = moved
    return stored - place.plus if place.plus else stored


def digests(file: Path) -> dict[str, str]:
    """{tensor: first 16 digits of the sha256 of its bytes}.

    Raises:
        CompressError: see open_file.
    """
    return {
        name: hashlib.sha256(np.ascontiguousarray(tensor.data).tobytes()).hexdigest()[:16]
        for name, tensor in tensors_of(open_file(file)).items()
    }


def _check_metadata(reader: Any, wanted: dict[str, Any]) -> None:
    """Refuse a size that is not that of config.json."""
    for key, right in wanted.items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
        same = np.float32(right) == found if isinstance(right, float) else right == found
        if not same:
            raise CompressError(
                f"{key} of {FILE} is {found}, and config.json makes it {right}", _HINT
            )


def _fill(module: Any, family: Family, stored: dict[str, Any]) -> None:
    """Give every parameter its tensor; all must be there, of the right shape, and no others."""
    head = family.head and module.get_submodule(family.head)
    expected = places(module, family, module.config)
    extra = extra_tensors(module.config, family.read_sizes(module.config)["head_dim"])
    if odd := sorted(stored.keys() ^ (expected.keys() | extra.keys())):
        which = "lacks" if odd[0] not in stored else "has a tensor too many:"
        raise CompressError(f"{FILE} {which} '{odd[0]}'", _HINT)
    for name, right in extra.items():
        if not torch.equal(value(stored[name]), right):
            raise CompressError(f"'{name}' of {FILE} is not what config.json makes it", _HINT)
    for name, place in expected.items():
        own = module.get_submodule(place.owner)
        found, shape = value(stored[name]), getattr(own, place.part).shape
        if found.shape != shape:
            raise CompressError(
                f"'{name}' of {FILE} is {list(found.shape)}, and config.json makes it "
                f"{list(shape)}",
                _HINT,
            )
        setattr(own, place.part, nn.Parameter(in_our_order(place, found)))
    if head and "output.weight" not in stored:
        head.weight = module.get_input_embeddings().weight
