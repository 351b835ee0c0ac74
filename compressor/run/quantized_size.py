"""The exact bytes of the weight file that a quantize stage will write, from shapes alone."""

from collections.abc import Collection
from pathlib import Path

import torch

from compressor.model.layers import install
from compressor.model.model import Model
from compressor.model.saving import quantized_files
from compressor.model.shapes import drop_extras, empty_model
from compressor.model.sources import PACKED
from compressor.model.stored import quantized_state
from compressor.model.stream import weight_bytes
from compressor.quantize.planned import planned
from compressor.quantize.weights import WeightOptions


def quantized_bytes(
    model: Model,
    options: WeightOptions,
    dtype: torch.dtype,
    sided: bool = False,
    stored: Collection[str] | None = None,
) -> int | None:
    """Bytes of model.safetensors or packed.safetensors, pieces and all but their index.

    Args:
        model: what is quantized, float; no value is read, so it may lie on the meta device.
        options: of the stage.
        dtype: of the weights that stay float.
        sided: whether layers have side paths, which stand in a file of their own.
        stored: names of the tensors of the source; None: all that the architecture has.

    Returns:
        None where weights decide about formats, or points are learned.
    """
    plan = planned(model, options)
    if not plan.exact:
        return None
    formats = plan.choices[0]
    module = empty_model(type(model.module), model.config)
    if stored is not None:
        drop_extras(module, model.family, lambda name: not any(f"{name}." in n for n in stored))
    formats = {name: form for name, form in formats.items() if _has(module, name)}
    with torch.device("meta"):
        install(module, formats)
    name, state = quantized_files(module, formats, dtype)
    if sided:
        name, state = PACKED, quantized_state(module, dtype)
    return weight_bytes(Path(name).stem, state)


def _has(module: torch.nn.Module, name: str) -> bool:
    return name in dict(module.named_modules(remove_duplicate=False))
