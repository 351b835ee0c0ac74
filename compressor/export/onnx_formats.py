"""Which quantized weights ONNX Runtime's operators take; told from formats alone, before any work.

MatMulNBits and GatherBlockQuantized of ONNX Runtime 1.32 take codes of 8, 4 and 2 bits in blocks of
16 to 256 inputs; codebooks (onnx_codebook.py) take any.
"""

from collections.abc import Mapping

from compressor.errors import CompressError
from compressor.model.manifest import WeightFormat

BITS = (8, 4, 2)
BLOCKS = (256, 128, 64, 32, 16)


def refuse(formats: Mapping[str, WeightFormat]) -> None:
    """Raise CompressError for the first module that ONNX Runtime cannot serve, with what can."""
    for name, form in formats.items():
        if form.bits is None or form.codebook is not None:
            continue
        if form.bits not in BITS:
            raise CompressError(
                f"ONNX Runtime serves weights of 8, 4 and 2 bits; '{name}' has {form.bits}",
                "quantize with 4 or 2 bits (bits, table_bits and mixed.choices without 3); the "
                "checkpoint itself runs in PyTorch, which compressor.open_engine(DIR) does, or use "
                "export.safetensors",
            )
        if form.group is not None and not any(form.group % block == 0 for block in BLOCKS):
            raise CompressError(
                f"ONNX Runtime has no groups of {form.group} inputs, as '{name}' has",
                "quantize with group 16, 32, 64, 128, 256 or null, or use export.safetensors",
            )
