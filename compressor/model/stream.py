"""Tensors to safetensors files and back, one tensor at a time.

A save never holds more than one converted tensor beside the model: the header of a file needs
shapes and dtypes only, so the tensors are made one after another while the file is written. The
layout is that of the safetensors library, byte for byte: 8 bytes length of the header, a JSON
header padded to a multiple of 8, then the data, larger dtypes first so that all stay aligned.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor

SHARD = 2_000_000_000  # bytes of one file; only a tensor that is larger alone exceeds it
_CODES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}
# among dtypes of one width the library has an order of its own
_RANK = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when it is needed; its shape and dtype are known before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def map(cls, function: Callable[[Tensor], Tensor], tensor: Tensor) -> "Lazy":
        """`function(tensor)`, whose shape and dtype the meta device tells without computing."""
        like = function(torch.empty_like(tensor, device="meta"))
        return cls(tuple(like.shape), like.dtype, lambda: function(tensor.detach()))

    def turned(self) -> "Lazy":
        """The transposed matrix."""
        return Lazy(self.shape[::-1], self.dtype, lambda: self.make().t())

    @property
    def bytes(self) -> int:
        """Bytes it takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    directory: Path, stem: str, tensors: dict[str, Lazy], shard: int | None = None
) -> None:
    """Write `stem`.safetensors, or pieces of at most `shard` bytes and their index.

    Args:
        directory: an existing directory.
        stem: `model` for what transformers loads.
        tensors: in the order in which they are spread over the pieces.
        shard: bytes of one piece, SHARD when None.
    """
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda lazy: lazy.bytes,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=SHARD if shard is None else shard,
    )
    for name, members in split.filename_to_tensors.items():
        _write(directory / name, {member: tensors[member] for member in members})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _write(file: Path, tensors: dict[str, Lazy]) -> None:
    order = sorted(tensors, key=lambda name: (_RANK.index(_CODES[tensors[name].dtype]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        lazy, start = tensors[name], end
        end += lazy.bytes
        dtype = _CODES[lazy.dtype]
        header[name] = {"dtype": dtype, "shape": lazy.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(_data(tensors[name]))


def _data(lazy: Lazy) -> Any:
    """The bytes of a tensor, row-major, as an array that `write` takes without a copy."""
    tensor = lazy.make()
    assert (tuple(tensor.shape), tensor.dtype) == (lazy.shape, lazy.dtype)
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def in_float32(files: list[Path], folder: Path) -> list[Path]:
    """Files with the same tensors, floats in float32; those given where they are that already.

    The new ones are written one tensor at a time into a folder of their own below `folder`.
    """
    codes = {code: dtype for dtype, code in _CODES.items()}
    slices = open_tensors(files, mapped=False)
    known = {name: codes[piece.get_dtype()] for name, piece in slices.items()}
    if all(dtype in (torch.float32, torch.int64) for dtype in known.values()):
        return files
    tensors = {
        name: Lazy(tuple(piece.get_shape()), dtype, lambda p=piece, d=dtype: p[...].to(d))
        for name, piece in slices.items()
        for dtype in (torch.float32 if known[name].is_floating_point else known[name],)
    }
    home = Path(tempfile.mkdtemp(dir=folder))
    write_tensors(home, "float32", tensors)
    return sorted(home.glob("*.safetensors"))


def open_tensors(files: Iterable[Path], mapped: bool) -> dict[str, Any]:
    """Every tensor of some files, unread; `slice[...]` reads one.

    Args:
        files: safetensors files, each checked before (model/sources.py).
        mapped: True maps the files: a tensor used as it is costs nothing until it is touched,
            but every page that was touched stays in memory. False reads each tensor into memory
            of its own, the right thing where it is converted and dropped.
    """
    found: dict[str, Any] = {}
    for file in files:
        pointer = safe_open(file, "pt", backend="mmap" if mapped else "pread")
        names = pointer.keys()
        found |= {name: pointer.get_slice(name) for name in names}
    return found
