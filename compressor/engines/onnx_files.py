"""Why an ONNX file does not load: lost data beside it, a library that is too old, or damage."""

from pathlib import Path
from typing import Any

from compressor.errors import CompressError, first_line

# how ONNX Runtime and OpenVINO speak of what only a newer version of them knows
_TOO_NEW = (
    *("IR version", "opset", "is not a registered function", "No Op registered"),
    *("Could not find an implementation", "not supported by"),
)


def refusal(file: Path, error: Exception, library: str, version: str) -> CompressError:
    """What to raise for a graph that a library failed to load.

    Args:
        file: the .onnx (or .xml) file.
        error: what the library raised.
        library: its name, for the sentence and for pip.
        version: its version here.
    """
    name, place, package = file.name, file.parent.name, library.lower().replace(" ", "")
    lost = _lost_data(file)
    if lost:
        return CompressError(
            f"{name} of '{place}' keeps weights in {lost}, which is not whole beside it",
            "copy the directory again, with every file of it",
        )
    said = first_line(error)
    if any(word in str(error) for word in _TOO_NEW):
        return CompressError(
            f"{name} of '{place}' asks for more than {library} {version} knows: {said}",
            f"pip install --upgrade {package}, or export with a lower opset",
        )
    return CompressError(f"{library} cannot load {name} of '{place}': {said}", "export it again")


def _lost_data(file: Path) -> str:
    """Name of the first file of external data that is missing or too short; "" for none."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(file), load_external_data=False)
    except DecodeError:
        return ""
    for tensor in model.graph.initializer:
        stated: dict[str, Any] = {entry.key: entry.value for entry in tensor.external_data}
        if "location" in stated:
            data = file.parent / stated["location"]
            end = int(stated.get("offset", 0)) + int(stated.get("length", 0))
            if not data.is_file() or data.stat().st_size < end:
                return data.name
    return ""
