"""MNIST's idx files: all images of a set in one gzipped file, their labels in another."""

import gzip
import hashlib
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compressor.errors import CompressError
from compressor.training.documents import Document, Media

IDX = "-images-idx3-ubyte.gz"


def read_idx(path: Path) -> list[Document]:
    """Documents of an idx file of images, with the labels that lie beside it.

    Raises:
        CompressError: a file is missing or damaged, or their counts differ.
    """
    labels = path.with_name(path.name.replace(IDX, "-labels-idx1-ubyte.gz"))
    for file in (path, labels):
        if not file.is_file():
            raise CompressError(f"data file '{file}' does not exist", f"get {file.name}")
    images, classes = idx_pixels(path), _idx(labels, 1)
    if len(images) != len(classes):
        raise CompressError(
            f"{path.name} has {len(images)} images and {labels.name} {len(classes)} labels",
            "get both files from the same place",
        )
    return [
        Document(label=int(c), media=Media(path, hashlib.sha256(x.tobytes()).hexdigest(), i))
        for i, (x, c) in enumerate(zip(images, classes, strict=True))
    ]


@lru_cache(maxsize=2)
def idx_pixels(path: Path) -> NDArray[np.uint8]:
    """Pixels [N, height, width] of all images of a file; the last files read are kept."""
    return _idx(path, 3)


def _idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """The bytes of an idx file: magic 0 0 8 axes, big-endian sizes, values."""
    try:
        raw = gzip.decompress(path.read_bytes())
        magic, *shape = struct.unpack_from(f">{axes + 1}I", raw)
        values = np.frombuffer(raw, np.uint8, offset=4 * (axes + 1)).reshape(shape)
    except (OSError, EOFError, struct.error, zlib.error, ValueError) as error:
        raise CompressError(f"'{path}' is damaged ({error})", "get the file again") from error
    if magic != 0x800 + axes:
        raise CompressError(f"'{path}' is no idx file of {axes} axes", "get the file again")
    return values
