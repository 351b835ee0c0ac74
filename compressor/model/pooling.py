"""The files by which sentence-transformers states how token states become one vector.

modules.json lists the modules in the order they run; the Pooling module's own config.json names
the mode. Up to sentence-transformers 5 the mode is a flag per mode and the width is called
word_embedding_dimension; later `"pooling_mode": "mean"` and embedding_dimension. Both are read;
the older form is written, because every version reads it.
"""

import json
from pathlib import Path
from typing import Any

from compressor.errors import CompressError
from compressor.model.model import Pooling

FLAGS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
}
_KINDS = ["Transformer", "Pooling", "Normalize"]


def read_pooling(path: Path) -> Pooling | None:
    """Pooling of a sentence-transformers directory, or None where there is none.

    Raises:
        CompressError: a file is missing or malformed, or the directory holds modules or a mode
            that an artefact could not reproduce.
    """
    listing = path / "modules.json"
    if not listing.is_file():
        return None
    try:
        modules = [(m["type"].rsplit(".", 1)[-1], str(m["path"])) for m in _read_json(listing)]
    except (KeyError, TypeError, AttributeError) as error:
        raise CompressError(f"{listing} is malformed", "restore the file") from error
    kinds = [kind for kind, _ in modules]
    if kinds != _KINDS[: len(kinds)]:
        raise CompressError(
            f"'{path.name}' is a sentence-transformers model of {', '.join(kinds)}; only "
            "Transformer, Pooling, Normalize in this order are supported",
            "take a model without other modules, or remove modules.json to compress the encoder "
            "alone",
        )
    if "Pooling" not in kinds:
        return None
    return Pooling(_read_mode(path / modules[1][1] / "config.json"), "Normalize" in kinds)


def _read_mode(file: Path) -> str:
    stated = _read_json(file)
    if not isinstance(stated, dict):
        raise CompressError(f"{file} is malformed", "restore the file")
    modes = stated.get("pooling_mode")
    if modes is None:  # flags; an unknown one stays in the list under its own name
        names = {flag: mode for mode, flag in FLAGS.items()}
        flags = [key for key, on in stated.items() if key.startswith("pooling_mode_") and on]
        modes = [names.get(flag, flag) for flag in flags]
    modes = modes if isinstance(modes, list) else [modes]
    if len(modes) != 1 or modes[0] not in FLAGS:
        raise CompressError(
            f"the pooling of '{file.parent.parent.name}' is {modes}, none of mean, cls, max",
            "use a model with one of these modes",
        )
    return modes[0]


def _read_json(file: Path) -> Any:
    if not file.is_file():
        raise CompressError(f"{file}, which modules.json names, is missing", "restore the file")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompressError(f"{file} is not valid JSON ({error})", "restore the file") from error


def fit_pooling(directory: Path, hidden: int) -> None:
    """Keep the width that a pooling config states equal to the hidden size."""
    for file in directory.glob("*_Pooling/config.json"):
        stated = _read_json(file)
        key = "embedding_dimension"
        stated[key if key in stated else f"word_{key}"] = hidden
        file.write_text(json.dumps(stated, indent=2), encoding="utf-8")
