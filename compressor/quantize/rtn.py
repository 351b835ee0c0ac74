"""Round to nearest, without data: the baseline every other quantizer has to beat.

    code = clip(round(w / scale) + zero, 0, 2^bits - 1)        (numerics/quantizer.py)

w_OI is cut into groups of `group` inputs, each with its own scale. No paper claims it; Nagel et
al. (arXiv 2106.08295) is a good description. Where we differ from common practice: scales are
rounded (up) to float16 before codes are chosen, so that every file format carries the same
numbers.
"""

from typing import Literal

from pydantic import Field, model_validator

from compressor.model.model import Model
from compressor.options import options
from compressor.quantize.activations import ACTIVATIONS, needs_channels
from compressor.quantize.mixed import mixed_targets
from compressor.quantize.weights import GridOptions, round_to_nearest
from compressor.training.workbench import Workbench


@options
class Options(GridOptions):
    """What to quantize and how finely."""

    bits: Literal[8, 4, 3, 2] = Field(
        8, description="bits per weight; ONNX Runtime serves 8, 4 and 2"
    )
    group: int | None = Field(
        32, ge=2, description="inputs per scale; null: one scale per output channel"
    )
    activation: Literal["none", "dynamic", "token"] = Field(
        "none",
        description="round activations to 8 bits at run time (8-bit symmetric weights, group "
        "null); dynamic: per tensor, fastest, but a row then depends on its batch; token: each "
        "token by itself",
    )

    @model_validator(mode="after")
    def _activation_needs_channels(self) -> "Options":
        needs_channels(self, self.activation)
        return self

    @property
    def rounded_inputs(self) -> str:
        """The same for all Linears."""
        return self.activation


def run(model: Model, options: Options, work: Workbench) -> None:
    """Replace Linear (and Embedding) modules by quantized ones, in place; fill `model.formats`.

    Raises:
        CompressError: see weights.targets and mixed.
    """
    found, activation = mixed_targets(model, options), ACTIVATIONS[options.activation]
    with work.progress("quantize", len(found)) as advance:
        for target in found:
            round_to_nearest(model, target, options, activation)
            advance(1)
