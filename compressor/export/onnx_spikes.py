"""The projections of a spike-driven transformer in ONNX: MatMulNBits over levels, scales outside.

MatMulNBits gets our packed codes with all scales 1 and float activations, so what it adds up are
integers: exact, in whatever order. The scale of every output is multiplied afterwards, as in
model/qsd_layers.py, and the file gives what torch gives, bit for bit. Activations rounded by block,
which serve other models, would move a level here and there.
"""

import torch
from torch import Tensor, nn

from compressor.export.onnx_ops import matmul_nbits
from compressor.model.layers import QuantLinear


class SpikeLinear(nn.Module):
    """What `qsd_layers.project` asks of a quantized Linear."""

    packed: Tensor
    ones: Tensor
    scale_O: Tensor

    def __init__(self, linear: QuantLinear, packed: Tensor) -> None:
        super().__init__()
        self.bits, self.bias = linear.bits, linear.bias
        self.register_buffer("packed", packed)
        self.register_buffer("ones", torch.ones(packed.shape[:2]))
        self.register_buffer("scale_O", linear.scale_O)

    def integer_sums(self, levels: Tensor) -> Tensor:
        """As QuantLinear.integer_sums."""
        return matmul_nbits(levels, self.packed, self.ones, None, None, self.bits, rounds=False)
