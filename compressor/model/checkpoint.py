"""Checkpoints from disk: load with every oddity handled once at this door (saving.py writes them).

Float weights and those of compressed-tensors lie where plain transformers reads them; other codes,
and sparse weights packed without their zeros (docs/formats.md), in a file of another name.
"""

import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.errors import CompressError, first_line
from compressor.model import layers
from compressor.model.coded import packed_view
from compressor.model.compressed import in_our_names
from compressor.model.compressed_config import obstacle
from compressor.model.conv1d import to_linear, turned_names
from compressor.model.families import Family, find_family
from compressor.model.kv_cache import METHOD, has_scales, read_cache_scales
from compressor.model.manifest import NAME as MANIFEST
from compressor.model.manifest import Manifest, WeightFormat, quantized, read_manifest
from compressor.model.model import Model, task_of
from compressor.model.packed import dense_view
from compressor.model.pooling import read_pooling
from compressor.model.shapes import config_of, drop_extras, model_class
from compressor.model.side import read_sides
from compressor.model.sources import CACHE, is_packed, read_config, stated_config, weight_files
from compressor.model.sparse import broken_promise
from compressor.model.spill import Spill
from compressor.model.stream import in_float32, open_tensors

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint directory and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Open a directory that `compress run` wrote.

        Raises:
            CompressError: the directory has no manifest, or a damaged one.
        """
        return cls(Path(path), read_manifest(Path(path)))

    @property
    def rounds_cache(self) -> bool:
        """Whether its manifest says that keys and values are stored in 8 bits."""
        return any(stage.method == METHOD for stage in self.manifest.stages)

    def load(self, spill: Path | None = None) -> Model:
        """Load the model: float32 on the CPU, eval mode, quantized modules in place.

        `spill`: see load_directory.

        Raises:
            CompressError: it cannot be loaded, or its zeros are not those of the manifest.
        """
        model = load_directory(self.path, self.manifest.formats, spill)
        if self.rounds_cache and not has_scales(model):
            raise CompressError(
                f"'{self.path.name}' misses {CACHE}, the scales of its cache in 8 bits",
                "put the file back, or make it again",
            )
        broken = broken_promise(model, self.manifest.formats)
        if broken:
            raise CompressError(
                f"the weights of '{self.path.name}' are not as its manifest says: {broken}",
                "put its own weights back, or make it again",
            )
        return model


def load_directory(
    path: Path, formats: dict[str, WeightFormat] | None = None, spill: Path | None = None
) -> Model:
    """Load a plain Hugging Face directory or one of ours.

    Args:
        path: directory with config.json and safetensors files.
        formats: quantized modules; read from manifest.json when there is one and None is given.
        spill: a folder with room for the float weights in float32; these then stay in files, and
            memory is needed for those in use only. Whoever changes a weight must replace it: what
            is written into it in place takes memory until the model goes.

    Returns:
        A `Model` in float32 on the CPU, in eval mode.

    Raises:
        CompressError: not a checkpoint, unknown architecture, damaged or incomplete weights.
    """
    raw = read_config(path, own=formats is not None)
    family = find_family(raw["model_type"])
    files = weight_files(path)
    if formats is None and (path / MANIFEST).is_file():
        formats = read_manifest(path).formats
    known = formats is not None
    formats = dict(formats or {})
    if quantized(formats):
        module = _load_quantized(path, raw, family, formats, files)
    else:
        module = _load_float(path, raw, family, files, spill)
    module.eval()
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    model = Model(
        module=module,
        family=family,
        processor=load_processor(path),
        formats=formats,
        pooling=read_pooling(path),
        source_dtype=dtype,
    )
    promised = {name for name, form in formats.items() if form.side_rank is not None}
    read_sides(model, path, promised if known else None)
    read_cache_scales(model, path)
    return model


def _load_float(
    path: Path, raw: dict[str, Any], family: Family, files: list[Path], spill: Path | None
) -> nn.Module:
    config = config_of(raw)
    cls = model_class(family, config)
    # a file that is cast or filled up must not stay in memory beside the result
    cast = str(raw.get("dtype") or raw.get("torch_dtype") or "float32") != "float32"
    given = files
    if spill is not None and not is_packed(files):
        files, cast = in_float32(files, spill), False
    tensors = open_tensors(files, mapped=not cast and not is_packed(files))
    if is_packed(files):
        tensors = dense_view(tensors, turned_names(cls, config))
    try:
        module, report = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            output_loading_info=True,
            dtype=torch.float32,
            generation_config=_generation_config(path, cls),
        )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise CompressError(
            f"transformers cannot load '{path.name}': {first_line(error)}",
            "check that config.json and the weights belong together",
        ) from error
    _complete(path, family, module, set(report["missing_keys"]), report["mismatched_keys"])
    _refuse_more_layers(path, module, report["unexpected_keys"])
    if files != given:  # mapped by now: the disk gets them back with the model
        shutil.rmtree(files[0].parent)
    return to_linear(module) if spill is None else to_linear(module, Spill(spill).store)


def _generation_config(path: Path, cls: Any) -> Any:
    """What generation_config.json says; without one, what transformers reads from config.json."""
    from transformers import GenerationConfig

    if not cls.can_generate():
        return None
    if (path / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(path, local_files_only=True)
    return GenerationConfig.from_pretrained(
        path, config_file_name="config.json", _from_model_config=True, local_files_only=True
    )


def _complete(path: Path, family: Family, module: Any, missing: set[str], wrong: Any) -> None:
    """Refuse missing weights; a pooler that was never stored is dropped, not made up."""
    extras = {f"{name}.{part}" for name in family.extras for part in ("weight", "bias")}
    prefix = f"{module.base_model_prefix}."
    if missing and {key.removeprefix(prefix) for key in missing} <= extras:
        _drop_unstored(module, family, ())
        return
    if missing or wrong:
        names = ", ".join(sorted(missing | {str(w) for w in wrong})[:3])
        raise CompressError(
            f"the weights of '{path.name}' do not fill the model of its config.json ({names} ...)",
            "get config.json and weights from the same place",
        )


def _refuse_more_layers(path: Path, module: nn.Module, unexpected: Collection[str]) -> None:
    """Refuse weights of layers that config.json does not have; other heads are left unread."""
    known = {_NUMBER.sub("#", name) for name in module.state_dict()}
    more = sorted(name for name in unexpected if _NUMBER.sub("#", name) in known)
    if more:
        raise CompressError(
            f"the weights of '{path.name}' have more layers than its config.json ({more[0]} ...)",
            "get config.json and weights from the same place",
        )


def _drop_unstored(module: Any, family: Family, stored: Collection[str]) -> None:
    """Remove the extra modules (a pooler) of which nothing is stored."""
    drop_extras(module, family, lambda name: not any(f"{name}." in key for key in stored))


def _load_quantized(
    path: Path,
    raw: dict[str, Any],
    family: Family,
    formats: dict[str, WeightFormat],
    files: list[Path],
) -> nn.Module:
    tensors = open_tensors(files, mapped=False)
    module = build(raw, family)
    _drop_unstored(module, family, tensors)
    layers.install(module, formats)
    if is_packed(files):
        tensors = packed_view(module, tensors)
    elif found := obstacle(module, formats):
        raise CompressError(
            f"the formats of '{path.name}' are not those of its weights: {found.what}",
            "get weights, config.json and manifest.json from the same place",
        )
    else:
        tensors = in_our_names(module, formats, tensors)
    layers.state_from_disk(module, tensors)
    return module


def build(raw: dict[str, Any], family: Family) -> nn.Module:
    """Build the architecture of a config.json without initializing its weights."""
    from transformers.initialization import no_init_weights

    config = config_of(raw)
    with no_init_weights():
        module = model_class(family, config)(config).float()
    module.tie_weights()
    return to_linear(module)


def read_task(path: Path) -> str:
    """Task of the checkpoint in a directory (see Model.task), from its config alone."""
    raw = stated_config(path)
    return task_of(model_class(find_family(raw["model_type"]), config_of(raw)).__name__)


def load_processor(path: Path) -> Any:
    """The tokenizer beside a checkpoint, or None when there is none."""
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise CompressError(
            f"the tokenizer of '{path.name}' cannot be loaded: {first_line(error)}",
            "restore its tokenizer files",
        ) from error
