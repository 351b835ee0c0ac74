"""NF4, the 4-bit NormalFloat of QLoRA (arXiv 2305.14314), without data.

    scale_OG = max |w_OGg|,   code = the point of NF4 nearest to w / scale,   w' = NF4[code] * scale

NF4 has 16 points at quantiles of a normal distribution, 0 and both ends among them, so that weights
that are normally distributed use all codes about equally often. Shapes: O outputs, I inputs in
groups of g, by default 64 as in the paper; G = I / g.

Where we differ: the paper quantizes the float32 scales a second time, to 8 bits in blocks of 256
("double quantization", 0.13 instead of 0.5 bits per weight). Ours are float16 (0.25 bits), rounded
upwards before codes are chosen, like those of every other method here. Groups lie in rows;
bitsandbytes cuts the flattened weight, which is the same where the group divides the inputs. With
the same scales the codes are those of bitsandbytes. An exact zero stays one, so masks survive.

Codes need a table look-up, for which ONNX Runtime has no operator of its own: exported, a layer
runs at the speed of float (export/onnx_codebook.py). For speed take a uniform grid, quantize.rtn.
"""

from typing import Literal

import torch
from pydantic import Field

from compressor.errors import CompressError
from compressor.model.model import Model
from compressor.numerics.codebook import NF4, nf4
from compressor.options import options
from compressor.quantize.weights import WeightOptions, place, targets, weight_of
from compressor.training.workbench import Workbench


@options
class Options(WeightOptions):
    """What to quantize; NF4 has 4 bits and is symmetric."""

    bits: Literal[4] = Field(4, description="bits per weight")
    group: int | None = Field(
        64, ge=2, description="inputs per scale; null: one scale per output channel"
    )
    symmetric: Literal[True] = Field(True, description="no offsets")

    @property
    def codebook(self) -> str:
        """The points of every layer."""
        return "nf4"


def run(model: Model, options: Options, work: Workbench) -> None:
    """Replace Linear (and Embedding) modules by quantized ones, in place; fill `model.formats`.

    Raises:
        CompressError: see weights.targets.
    """
    found = targets(model, options)
    with work.progress("quantize", len(found)) as advance:
        for target in found:
            codes, scale = nf4(weight_of(model, target.name), target.group)
            if not bool(scale.isfinite().all()):
                raise CompressError(
                    f"the weight of '{target.name}' is so large that its scale overflows float16",
                    "start from a sound checkpoint",
                )
            parts = {"codes_OI": codes, "scale": scale, "points_P": torch.tensor(NF4)}
            place(model, target, parts, codebook="nf4")
            advance(1)
