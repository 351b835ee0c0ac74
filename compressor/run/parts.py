"""What is inside files, with a checksum each, by which `verify` names what changed.

The sha256 of a file says that something did; these say which key of a JSON file, which tensor of
safetensors or GGUF, which initializer of a graph, wherever its bytes lie.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

from compressor.engines.gguf import digests
from compressor.model.manifest import NAME as MANIFEST
from compressor.model.manifest import Manifest, list_files
from compressor.run.machine import machine, packages

KEY = "parts"  # in metrics: {file: {part: checksum}}
_PIECE = 1 << 24  # bytes read at once


def sealed(directory: Path, manifest: Manifest) -> Manifest:
    """The manifest of a directory that is whole: with its files and their parts, and where made."""
    return replace(
        manifest,
        metrics=manifest.metrics | {KEY: parts_of(directory)},
        files=list_files(directory),
        packages=packages(),
        machine=machine(),
    )


def parts_of(directory: Path) -> dict[str, dict[str, str]]:
    """{file: {part: checksum}} of every file whose parts are known, the manifest left out."""
    files = sorted(f for f in directory.rglob("*") if f.is_file() and f.name != MANIFEST)
    found = {f.relative_to(directory).as_posix(): parts(f) for f in files}
    return {name: inside for name, inside in found.items() if inside}


def parts(file: Path) -> dict[str, str]:
    """{part: checksum} of a file; nothing where its kind has none, or where it cannot be read."""
    reader = _READERS.get(file.suffix)
    try:
        return {} if reader is None else dict(reader(file))
    except Exception:  # of whatever kind: four libraries read what may be damaged
        return {}


def changed(directory: Path, name: str, stated: dict[str, dict[str, str]]) -> str:
    """The first part of a file that is not as stated, and how many are not; "" where none is.

    Args:
        name: of the file; that of external data stands for its graph.
        stated: see parts_of.
    """
    name = name.removesuffix(".data")
    before, now = stated.get(name, {}), parts(directory / name) if name in stated else {}
    if not now:
        return ""
    names = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
    return f"'{names[0]}' changed, {len(names)} in all" if names else ""


def _keys(file: Path) -> Iterator[tuple[str, str]]:
    for key, value in json.loads(file.read_text(encoding="utf-8")).items():
        yield key, _sum(json.dumps(value, sort_keys=True).encode())


def _tensors(file: Path) -> Iterator[tuple[str, str]]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > file.stat().st_size:
            raise ValueError("the header is longer than the file")
        header = json.loads(stream.read(size))
    for name, entry in header.items():
        if name == "__metadata__":
            yield name, _sum(json.dumps(entry, sort_keys=True).encode())
            continue
        start, end = entry["data_offsets"]
        yield name, _slice(file, 8 + size + start, end - start, f"{entry['dtype']}{entry['shape']}")


def _initializers(file: Path) -> Iterator[tuple[str, str]]:
    import onnx

    for tensor in onnx.load(file, load_external_data=False).graph.initializer:
        head = f"{tensor.data_type}{list(tensor.dims)}"
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            at = {entry.key: entry.value for entry in tensor.external_data}
            span = int(at.get("offset", 0)), int(at["length"])
            yield tensor.name, _slice(file.with_name(at["location"]), *span, head)
        else:
            yield tensor.name, _sum(tensor.SerializeToString())


def _slice(file: Path, start: int, length: int, head: str) -> str:
    """Checksum of a text and `length` bytes of a file."""
    total = crc32(head.encode())
    with file.open("rb") as stream:
        stream.seek(start)
        while length > 0 and (piece := stream.read(min(_PIECE, length))):
            total, length = crc32(piece, total), length - len(piece)
    return f"{total:08x}"


def _sum(content: bytes) -> str:
    return f"{crc32(content):08x}"


_READERS: dict[str, Any] = {
    ".json": _keys,
    ".safetensors": _tensors,
    ".onnx": _initializers,
    ".gguf": lambda file: digests(file).items(),
}
