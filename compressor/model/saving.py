"""Checkpoints written to disk: configuration, weights in their form, side paths, scales of a cache.

A float checkpoint is what plain transformers writes, and so is a quantized one where
compressed-tensors has a form for all of it. Other codes, and sparse weights packed without their
zeros (docs/formats.md), get a file of another name, so that transformers refuses the directory
instead of loading half of it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compressor.model.compressed import compressed_state
from compressor.model.compressed_config import obstacle, quantization_config
from compressor.model.conv1d import turned_names
from compressor.model.kv_cache import write_cache_scales
from compressor.model.manifest import WeightFormat, quantized
from compressor.model.model import Model
from compressor.model.pooling import fit_pooling
from compressor.model.side import write_sides
from compressor.model.side_files import copy_side_files
from compressor.model.sources import FLOAT, PACKED
from compressor.model.stored import float_state, quantized_state
from compressor.model.stream import Lazy, write_tensors


def save(model: Model, directory: Path, parent: Path, shard: int | None = None) -> None:
    """Write a model and the side files of its parent into an existing directory.

    Float weights are written in the dtype the source had, as transformers would; quantized ones as
    codes (`quantized_files`), whose scales stay float16. Beside the model only one
    tensor at a time is in memory, and the side paths of a model that has some. The manifest and
    the probe are the caller's business.

    Args:
        model: what to save.
        directory: an existing directory.
        parent: checkpoint directory whose side files travel along.
        shard: bytes of one weight file, stream.SHARD when None.
    """
    names = [name for name, _ in model.module.named_parameters()]
    assert not any("parametrizations" in name for name in names), "an active parametrization"
    copy_side_files(parent, directory)
    fit_pooling(directory, model.sizes["hidden"])
    dtype = getattr(torch, model.source_dtype)
    if quantized(model.formats):
        write_quantized(model.module, model.formats, directory, dtype, shard)
    else:
        write_float(model.module, directory, float_state(model.module, dtype), dtype, shard)
    write_sides(model, directory, dtype)
    write_cache_scales(model, directory)


def quantized_files(
    module: Any, formats: Mapping[str, WeightFormat], dtype: torch.dtype
) -> tuple[str, dict[str, Lazy]]:
    """The name of the weight file of a model with Quant modules, and its tensors.

    That is FLOAT in the layout of compressed-tensors where it has a form for all of them, else
    PACKED in ours. The model may lie on the meta device.
    """
    if obstacle(module, formats) is None:
        return FLOAT, compressed_state(module, formats, dtype)
    return PACKED, quantized_state(module, dtype)


def write_quantized(
    module: Any,
    formats: Mapping[str, WeightFormat],
    directory: Path,
    dtype: torch.dtype,
    shard: int | None = None,
) -> None:
    """Write config and weights of a model with Quant modules."""
    name, state = quantized_files(module, formats, dtype)
    write_config(module, directory, dtype)
    if name == FLOAT:
        _add_to_config(directory, {"quantization_config": quantization_config(module, formats)})
        _write_generation_config(module, directory)
    write_tensors(directory, Path(name).stem, state, shard)


def write_float(
    module: Any,
    directory: Path,
    state: dict[str, Lazy],
    dtype: torch.dtype,
    shard: int | None = None,
    name: str = FLOAT,
) -> None:
    """Write what `save_pretrained` would write of a module, with `state` for its weights.

    Args:
        state: {name in the file: tensor as it is in memory}; GPT-2's are turned here.
        name: of the weight file; PACKED where `state` is one of model/packed.py.
    """
    write_config(module, directory, dtype)
    _write_generation_config(module, directory)
    write_tensors(directory, Path(name).stem, turned_state(module, state), shard)


def _write_generation_config(module: Any, directory: Path) -> None:
    if module.can_generate() and not (directory / "generation_config.json").is_file():
        module.generation_config.save_pretrained(directory)  # else the parent's was copied


def turned_state(module: Any, state: dict[str, Lazy]) -> dict[str, Lazy]:
    """`state` with the matrices turned that the module's class stores with inputs first."""
    turned = turned_names(type(module), module.config)  # names on disk are those in memory
    return {name: lazy.turned() if name in turned else lazy for name, lazy in state.items()}


def write_config(module: Any, directory: Path, dtype: torch.dtype) -> None:
    """Write config.json: the module's class and sizes, and the dtype of the stored weights."""
    module.config.architectures = [type(module).__name__]
    module.config.save_pretrained(directory)
    _add_to_config(directory, {"dtype": str(dtype)[6:]})


def _add_to_config(directory: Path, keys: dict[str, Any]) -> None:
    file = directory / "config.json"
    content = json.loads(file.read_text(encoding="utf-8")) | keys
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
