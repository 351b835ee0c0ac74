"""The agreement gate: the engine that will serve an artefact must give the probe's outputs.

The probe holds what our torch reference computes with the same arithmetic as the engine, so the
comparison is tight. Tolerances are relative errors (norm of the difference over the norm).
"""

from collections.abc import Iterable

from compressor.engines import Engine
from compressor.model.manifest import WeightFormat
from compressor.model.probe import Exchange, largest_difference

# Float graphs differ from torch only in the order of sums.
FLOAT_TOLERANCE = 1e-4
# Integer kernels round activations to 8 bits: a sum that ends one ulp away now and then moves an
# activation to the next code, and one code is 1/127 of its block's largest value.
INTEGER_TOLERANCE = 1e-2


def tolerance_of(formats: Iterable[WeightFormat]) -> float:
    """The relative error allowed for a model of these formats."""
    return INTEGER_TOLERANCE if any(f.bits for f in formats) else FLOAT_TOLERANCE


def disagreement(engine: Engine, exchanges: list[Exchange]) -> dict[str, float]:
    """Largest relative error per output over the probe's batches; NaN counts as infinity."""
    worst: dict[str, float] = {}
    for inputs, expected in exchanges:
        found = largest_difference(expected, engine.outputs(inputs), inputs["attention_mask"])
        for name, error in found.items():
            worst[name] = max(worst.get(name, 0.0), error)
    return worst
