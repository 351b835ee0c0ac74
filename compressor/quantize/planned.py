"""The formats that a quantize stage will leave, told before any weight is looked at."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from compressor.model.manifest import WeightFormat
from compressor.model.model import Model
from compressor.model.scaling import unfolded
from compressor.model.sparse import prunable
from compressor.quantize.activations import ACTIVATIONS
from compressor.quantize.rescaled import RescaledOptions
from compressor.quantize.targets import quantizable
from compressor.quantize.weights import GridOptions, WeightOptions, bits_of, takes_activation


@dataclass(frozen=True)
class Plan:
    """What a stage may leave.

    Attributes:
        choices: the same modules, once for every number of bits that a layer may have.
        exact: whether there is one choice, and all of it is known; else weights decide, or more is
            added to a codebook.
    """

    choices: list[dict[str, WeightFormat]]
    exact: bool


def planned(model: Model, options: WeightOptions) -> Plan:
    """Formats of a model, which may lie on the meta device.

    Raises:
        CompressError: see targets.quantizable.
    """
    mixed = options.mixed if isinstance(options, GridOptions) else None
    bits = (None,) if mixed is None else mixed.rising
    choices = [dict(_formats(model, options, each)) for each in bits]
    return Plan(choices, options.known_beforehand)


def _formats(
    model: Model, options: WeightOptions, chosen: int | None
) -> Iterator[tuple[str, WeightFormat]]:
    """Formats by name; `chosen` are the bits that a budget may choose."""
    activation = ACTIVATIONS[options.rounded_inputs]
    inside = prunable(model) if isinstance(options, RescaledOptions) else None
    multiplied = set(unfolded(model)) if options.multiplies_inputs else set()
    for names in quantizable(model, options.embeddings, options.head):
        bits = bits_of(model, names, options) if chosen is None else chosen
        for name in names:
            module = model.module.get_submodule(name)
            assert isinstance(module.weight, Tensor)
            inputs = module.weight.shape[1]
            even = options.row_group is not None and inputs % options.row_group == 0
            rounds = takes_activation(model, name, names, bits)
            rounds = rounds and (inside is None or name in inside)
            scaled = {"scaled": True} if name in multiplied else {}
            yield (
                name,
                replace(
                    model.formats.get(name, WeightFormat()),
                    bits=bits,
                    group=options.row_group if even else None,
                    symmetric=options.symmetric,
                    activation=activation | scaled if activation and rounds else None,
                    codebook=options.codebook,
                ),
            )
