"""Which exports hold the quantized weights of a model as they are, for whoever is refused one."""

from collections.abc import Iterator
from contextlib import contextmanager

from compressor.errors import CompressError
from compressor.export import compressed_tensors, gguf, huffman, onnx_formats
from compressor.model.kv_cache import has_scales
from compressor.model.manifest import quantized
from compressor.model.model import Model


@contextmanager
def naming_holders(model: Model, but: str = "") -> Iterator[None]:
    """Add to the hint of what the block refuses the exports that would hold it.

    Args:
        model: may lie on the meta device.
        but: the export that is refused, for whatever reason.
    """
    try:
        yield
    except CompressError as error:
        found = [name for name in holders(model) if name != but]
        if not found or type(error) is not CompressError:
            raise
        more = f"; {' or '.join(found)} would hold these weights as they are"
        raise CompressError(error.what, error.hint + more) from error


def holders(model: Model) -> list[str]:
    """Names of exports of quantized weights that take this model's formats."""
    if not quantized(model.formats) or has_scales(model):
        return []
    checks = {
        "export.onnx": lambda: onnx_formats.refuse(model.formats),
        "export.compressed_tensors": lambda: compressed_tensors.refuse(model.module, model.formats),
        "export.gguf": lambda: gguf.refuse(model, gguf.Options()),
        "export.huffman": lambda: huffman.refuse(model.formats),
    }
    found = []
    for name, check in checks.items():
        try:
            check()
        except CompressError:
            continue
        found.append(name)
    return found
