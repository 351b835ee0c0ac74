"""The agreement gate: the engine that will serve an artefact must give what torch gives.

The probe holds the outputs of the model in torch: the same codes and scales, float activations.
Two comparisons, as relative errors (norm of the difference over the norm, worst probe batch):

exact   the same file with the engine's activations in float, where its kernels would round them
        to 8 bits: nothing may differ but the order of sums, so a wrong code, scale or node shows.
        A GGUF file is read back into PyTorch for that. OpenVINO and transformers have no such twin.
served  the file as it will be served: rounding of activations is allowed for, garbage is not.

Of models that write text both are also taken of a greedy continuation, token by token on the
engine's own cache. In the tightest comparison its tokens must be those of torch.
"""

from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.engines import GRAPHS, Engine, open_engine_of
from compressor.model.manifest import WeightFormat
from compressor.run.agreement import Comparison, compare

# Float graphs differ from torch only in the order of sums: measured at most 2e-6.
EXACT = 1e-4
# Weights rounded to the 11 bits of float16: measured 6e-4 on an encoder of 6 layers. Also a cache
# in 8 bits, which torch rounds too: a key between two codes may fall to either in another order.
HALF = 5e-3
# 8-bit activations with a scale for each block of inputs move outputs by one half to three per cent
# per model, measured on encoders and decoders of 4 to 6 layers; the probe's random tokens are
# harder than text.
ROUNDED = 0.1
# llama.cpp keeps keys and values in float16, and rounds activations to the type of the weights they
# meet; quantized weights meet activations of 8 bits per block, as above. See docs/formats.md.
LLAMA = 3e-2
# One scale for a token or a tensor: 8 to 16 per cent on the probe of an encoder of 6 layers.
ROUNDED_WHOLE = 0.4


@dataclass(frozen=True)
class Agreement:
    """What was compared with torch, and what was allowed."""

    served: Comparison
    served_tolerance: float
    exact: Comparison | None  # None where the engine computes in float anyway
    exact_tolerance: float = EXACT

    @property
    def tightest(self) -> Comparison:
        """The comparison that allows least."""
        return self.served if self.exact is None else self.exact

    @property
    def errors(self) -> dict[str, float]:
        """The relative errors of the tightest comparison."""
        return self.tightest.errors

    @property
    def tolerance(self) -> float:
        """What is allowed in the tightest comparison."""
        return self.served_tolerance if self.exact is None else self.exact_tolerance

    @property
    def failure(self) -> str:
        """What does not hold, or ""; NaN and missing outputs count as infinite errors."""
        compared = (
            [("with float activations", self.exact, self.exact_tolerance)] if self.exact else []
        )
        compared.append(("as served", self.served, self.served_tolerance))
        for name, found, allowed in compared:
            for output, error in found.errors.items():
                if not error <= allowed:
                    return (
                        f"{output} {name} is off by {error:.1e} (relative), allowed {allowed:.0e}"
                    )
            if found.loop:
                return found.loop
        if self.tolerance <= HALF and self.tightest.greedy and self.tightest.greedy.wrong:
            return f"the greedy text is another: {self.tightest.greedy.wrong}"
        return ""

    @property
    def ok(self) -> bool:
        """Whether all comparisons hold."""
        return not self.failure

    def metrics(self) -> dict[str, Any]:
        """What a manifest keeps: {agreement, tolerance, served, differences}."""
        compared = {"exact": self.exact, "served": self.served}
        return {
            "agreement": self.errors,
            "tolerance": self.tolerance,
            "served": self.served.errors,
            "differences": {name: c.differences() for name, c in compared.items() if c},
        }


def check_agreement(
    engine: Engine,
    formats: Collection[WeightFormat],
    directory: Path,
    metrics: Mapping[str, Any] | None = None,
) -> Agreement:
    """Compare an open engine, and its exact twin where there is one, with the probe.

    Args:
        formats: of the directory's modules.
        metrics: of its manifest; they say whether float weights, keys and values were rounded.
    """
    told = metrics or {}
    least = HALF if told.get("float16", {}).get("rounded") or "cache" in told else EXACT
    quantized = [f for f in formats if f.bits is not None and f.codebook is None]
    whole = any(f.activation is not None for f in quantized)
    served = engine.name in GRAPHS and bool(quantized)
    # OpenVINO and transformers round activations by formulas of their own
    elsewhere = {"openvino": bool(quantized), "transformers": whole}
    rounds = served or elsewhere.get(engine.name, False)
    allowed = (ROUNDED_WHOLE if whole else ROUNDED) if rounds else least
    exact = None
    if served:
        kind: Any = type(engine)
        with closing(kind(directory, exact=True)) as twin:
            exact = compare(twin, directory, least)
    elif engine.name == "llama.cpp":
        allowed = ROUNDED if quantized else LLAMA
        with closing(open_engine_of("gguf", directory)) as twin:
            exact = compare(twin, directory, least)
    return Agreement(compare(engine, directory, allowed), allowed, exact, least)


def open_and_check(
    name: str,
    directory: Path,
    formats: Collection[WeightFormat],
    metrics: Mapping[str, Any] | None = None,
) -> Agreement:
    """Open a directory in an engine, compare with its probe, close."""
    with closing(open_engine_of(name, directory)) as engine:
        return check_agreement(engine, formats, directory, metrics)
