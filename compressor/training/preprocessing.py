"""How images and clips become numbers, as the files of a checkpoint say."""

import json
from pathlib import Path
from typing import Any

from compressor.errors import CompressError

FILE = "preprocessor_config.json"
NESTED = "processor_config.json"  # transformers 5 writes one file for the tokenizer's companions


def preprocessing_of(path: Path, entry: str) -> dict[str, Any]:
    """What a checkpoint directory says about its `entry`: feature_extractor or image_processor.

    As in transformers, the entry of processor_config.json counts before
    preprocessor_config.json; {} where there is neither.

    Raises:
        CompressError: a file is damaged.
    """
    nested, file = path / NESTED, path / FILE
    found = read_json_object(nested).get(entry) if nested.is_file() else None
    if found is not None and not isinstance(found, dict):
        raise CompressError(f"{entry} in '{nested}' is no JSON object", "restore the file")
    if found is not None:
        return found
    return read_json_object(file) if file.is_file() else {}


def damaged(error: Exception) -> CompressError:
    """What to raise when the values of a preprocessing file lead to `error`."""
    return CompressError(
        f"{FILE} or {NESTED} has values that cannot be used ({type(error).__name__}: {error})",
        "restore the file",
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        CompressError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CompressError(f"'{path}' is not valid JSON ({error})", "restore the file") from error
    if not isinstance(found, dict):
        raise CompressError(f"'{path}' is no JSON object", "restore the file")
    return found
