"""The agreement gate: the engine that will serve an artefact must give what torch gives.

The probe holds the outputs of the model in torch: the same codes and scales, float activations.
Two comparisons, as relative errors (norm of the difference over the norm, worst probe batch):

exact   the same file with the engine's activations in float, where its kernels would round them
        to 8 bits: nothing may differ but the order of sums, so a wrong code, scale or node shows.
        A GGUF file is read back into PyTorch for that.
served  the file as it will be served: rounding of activations is allowed for, garbage is not.
"""

from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from compressor.engines import Engine, open_engine_of
from compressor.model.forward import output_mask
from compressor.model.manifest import WeightFormat
from compressor.model.probe import largest_difference, read_probe

# Float graphs differ from torch only in the order of sums: measured at most 2e-6.
EXACT = 1e-4
# 8-bit activations with a scale for each block of inputs move outputs by one half to three per cent
# per model, measured on encoders and decoders of 4 to 6 layers; the probe's random tokens are
# harder than text.
ROUNDED = 0.1
# llama.cpp keeps keys and values in float16, and rounds activations to the type of the weights they
# meet; quantized weights meet activations of 8 bits per block, as above. See docs/formats.md.
HALF = 3e-2
# One scale for a token or a tensor: 8 to 16 per cent on the probe of an encoder of 6 layers.
ROUNDED_WHOLE = 0.4


@dataclass(frozen=True)
class Agreement:
    """Relative errors per output, and what was allowed."""

    served: dict[str, float]
    served_tolerance: float
    exact: dict[str, float] | None  # None where the engine computes in float anyway

    @property
    def errors(self) -> dict[str, float]:
        """The errors of the tightest comparison."""
        return self.served if self.exact is None else self.exact

    @property
    def tolerance(self) -> float:
        """What is allowed in the tightest comparison."""
        return self.served_tolerance if self.exact is None else EXACT

    @property
    def failure(self) -> str:
        """What does not hold, or ""; NaN and missing outputs count as infinite errors."""
        compared = [("with float activations", self.exact or {}, EXACT)]
        compared.append(("as served", self.served, self.served_tolerance))
        for name, errors, allowed in compared:
            for output, error in errors.items():
                if not error <= allowed:
                    return (
                        f"{output} {name} is off by {error:.1e} (relative), allowed {allowed:.0e}"
                    )
        return ""

    @property
    def ok(self) -> bool:
        """Whether both comparisons hold."""
        return not self.failure


def check_agreement(
    engine: Engine, formats: Collection[WeightFormat], directory: Path
) -> Agreement:
    """Compare an open engine, and its exact twin where there is one, with the probe."""
    quantized = [f for f in formats if f.bits is not None and f.codebook is None]
    whole = any(f.activation is not None for f in quantized)
    served = engine.name == "onnxruntime" and bool(quantized)
    rounds = served or (engine.name == "transformers" and whole)  # by formulas of its own
    exact = None
    if served:
        from compressor.engines.onnxruntime import OnnxRuntimeEngine

        with closing(OnnxRuntimeEngine(directory, exact=True)) as twin:
            exact = disagreement(twin, directory)
    allowed = (ROUNDED_WHOLE if whole else ROUNDED) if rounds else EXACT
    if engine.name == "llama.cpp":
        with closing(open_engine_of("gguf", directory)) as twin:
            exact = disagreement(twin, directory)
        allowed = ROUNDED if quantized else HALF
    return Agreement(disagreement(engine, directory), allowed, exact)


def disagreement(engine: Engine, directory: Path) -> dict[str, float]:
    """Largest relative error per output over the probe's batches."""
    worst: dict[str, float] = {}
    for inputs, expected in read_probe(directory):
        found = largest_difference(expected, engine.outputs(inputs), output_mask(inputs))
        for name, error in found.items():
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


def open_and_check(name: str, directory: Path, formats: Collection[WeightFormat]) -> Agreement:
    """Open a directory in an engine, compare with its probe, close."""
    with closing(open_engine_of(name, directory)) as engine:
        return check_agreement(engine, formats, directory)
