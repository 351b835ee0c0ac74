"""The weights of a spike-driven transformer in ONNX: products over levels, scales outside.

MatMulNBits gets our packed codes with all scales 1 and float activations, so what it adds up are
integers: exact, in whatever order. The scale of every output is multiplied afterwards, as in
model/qsd_layers.py, and the file gives what torch gives, bit for bit. Activations rounded by block,
which serve other models, would move a level here and there. Kernels of convolutions are looked up
from our packed codes when the file is loaded; the exporter stores those of less than 8 kB as
floats.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from compressor.export.onnx_codebook import byte_points
from compressor.export.onnx_ops import matmul_nbits
from compressor.model.layers import QuantLinear
from compressor.numerics.packing import pack


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


class SpikeKernel(nn.Module):
    """What `qsd_stages.Convolution` asks of its quantized kernel."""

    packed: Tensor
    byte_points: Tensor
    scale_O: Tensor

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()
        bits = linear.bits if 8 % linear.bits == 0 else 8
        self.columns, self.bias = linear.in_features, linear.bias
        self.register_buffer("packed", pack(linear.codes_OI, bits))
        codes = torch.arange(2**linear.bits) - 2 ** (linear.bits - 1)
        self.register_buffer("byte_points", byte_points(codes, bits))
        self.register_buffer("scale_O", linear.scale_O)

    def integer_weight(self) -> Tensor:
        """As QuantLinear.integer_weight."""
        return embedding(self.packed.int(), self.byte_points).flatten(-2)[..., : self.columns]
