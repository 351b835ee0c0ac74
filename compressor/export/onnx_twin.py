"""A copy of a model whose quantized modules compute exactly what the ONNX file will compute.

The twin is what torch.onnx exports. Run in torch it does the arithmetic of the served file, int8
activations included; the tests compare single layers with ONNX Runtime that way. Weights are our
own codes in the layout of the nodes (onnx_ops.py); nothing is quantized again.

ONNX Runtime wants blocks of 16, 32, 64, 128 or 256 inputs. A group that is a multiple of a block
repeats its scale for every block, which changes no number.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from compressor.export.onnx_codebook import Codebook, CodebookEmbedding, CodebookLinear
from compressor.export.onnx_formats import BLOCKS, refuse
from compressor.export.onnx_ops import (
    dynamic_int8,
    gather_block_quantized,
    matmul_nbits,
    static_int8,
    token_int8,
)
from compressor.export.onnx_spikes import SpikeKernel, SpikeLinear
from compressor.model.layers import QuantEmbedding, QuantLinear
from compressor.model.model import Model
from compressor.model.side import beside
from compressor.model.tables import QuantTable
from compressor.numerics.packing import pack


class _Blocks:
    """A quantized table in the layout of the nodes."""

    def __init__(self, table: QuantTable) -> None:
        columns, self.bits = table.codes_OI.shape[1], table.bits
        block = _block_size(table)
        missing = -columns % block  # only with one scale per row
        middle = 2 ** (table.bits - 1)
        codes = pad(table.codes_OI, (0, missing), value=middle).unflatten(1, (-1, block))
        self.packed = pack(codes, table.bits)
        repeats = codes.shape[1] // table.scale_OG.shape[1]
        self.scale = table.scale_OG.float().repeat_interleave(repeats, dim=1)
        self.zero: Tensor | None = None
        if not table.format.symmetric:
            self.zero = table.zero_OG.repeat_interleave(repeats, dim=1)


def _block_size(table: QuantTable) -> int:
    columns, group = table.codes_OI.shape[1], table.format.group
    if group is None:
        fitting = [b for b in BLOCKS[1:] if columns % b == 0]
        return fitting[0] if fitting else 16
    return next(b for b in BLOCKS if group % b == 0)  # onnx_formats.py refused others


class _Linear(nn.Module):
    """QuantLinear as MatMulNBits."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, linear: QuantLinear, blocks: _Blocks) -> None:
        super().__init__()
        self.bits, self.bias, self.side = blocks.bits, linear.bias, linear.side
        self.register_buffer("packed", blocks.packed)
        self.register_buffer("scale", blocks.scale)
        self.register_buffer("zero", None if blocks.zero is None else pack(blocks.zero, self.bits))

    @property
    def weight(self) -> Tensor:
        """For code that asks a Linear for the dtype of its weight (T5); never for its values."""
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        y = matmul_nbits(x, self.packed, self.scale, self.zero, self.bias, self.bits)
        return beside(y, self.side, x)


class _Embedding(nn.Module):
    """QuantEmbedding as GatherBlockQuantized."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, embedding: QuantEmbedding, blocks: _Blocks) -> None:
        super().__init__()
        self.num_embeddings, self.columns = embedding.num_embeddings, embedding.embedding_dim
        self.bits, self.factor = blocks.bits, embedding.factor
        self.register_buffer("packed", blocks.packed)
        self.register_buffer("scale", blocks.scale.unsqueeze(-1))
        self.register_buffer("zero", None if blocks.zero is None else blocks.zero.unsqueeze(-1))

    def forward(self, ids: Tensor) -> Tensor:
        found = gather_block_quantized(ids, self.packed, self.scale, self.zero, self.bits)
        rows = found.flatten(-2)[..., : self.columns]
        return rows if self.factor == 1.0 else rows * self.factor


class _IntegerLinear(nn.Module):
    """QuantLinear with an activation: integer codes times int8 weights."""

    w_IO: Tensor
    scale_O: Tensor
    bias: nn.Parameter | None
    input_scale: Tensor
    input_zero: Tensor
    factor_I: Tensor | None

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()
        assert linear.format.activation is not None
        self.activation = linear.format.activation
        self.bias, self.side = linear.bias, linear.side
        self.register_buffer("w_IO", linear.int8_weight().contiguous())
        self.register_buffer("scale_O", linear.scale_OG[:, 0].float())
        self.register_buffer("factor_I", linear.factor_I)
        grid = torch.ones(()), torch.tensor(128, dtype=torch.uint8)  # of a token over its step
        if not self.activation["dynamic"]:
            grid = linear.input_scale, linear.input_zero
        self.register_buffer("input_scale", grid[0])
        self.register_buffer("input_zero", grid[1])

    @property
    def weight(self) -> Tensor:
        """As in _Linear."""
        return self.scale_O

    def forward(self, x: Tensor) -> Tensor:
        scaled = x if self.factor_I is None else x * self.factor_I
        return beside(self._product(scaled), self.side, x)

    def _product(self, x: Tensor) -> Tensor:
        if self.activation["dynamic"] and self.activation["per"] == "tensor":
            return dynamic_int8(x, self.w_IO, self.scale_O, self.bias)
        product = token_int8 if self.activation["dynamic"] else static_int8
        return product(x, self.w_IO, self.scale_O, self.input_scale, self.input_zero, self.bias)


@torch.no_grad()
def make_twin(model: Model) -> Model:
    """Return a model of the same name and shape for the exporter; float weights are shared.

    Raises:
        CompressError: a module's bits or groups cannot be expressed by ONNX Runtime's nodes.
    """
    refuse(model.formats)
    tensors = [*model.module.parameters(), *model.module.buffers()]
    module = copy.deepcopy(model.module, {id(t): t for t in tensors})
    module.set_attn_implementation("eager")  # type: ignore[operator]  # fewest nodes, fastest
    made: dict[int, _Blocks | Codebook] = {}
    for name, found in list(module.named_modules()):
        if isinstance(found, QuantLinear) and model.family.model_type == "qsd_transformer":
            kernel = name.endswith(".kernel")
            twin = SpikeKernel(found) if kernel else SpikeLinear(found, _Blocks(found).packed)
            module.set_submodule(name, twin.eval())
        elif isinstance(found, QuantTable):
            module.set_submodule(name, _twin_of(found, made).eval())
    return Model(module, model.family, model.processor, pooling=model.pooling)


def _twin_of(found: QuantTable, made: dict[int, _Blocks | Codebook]) -> nn.Module:
    if isinstance(found, QuantLinear) and found.format.activation is not None:
        return _IntegerLinear(found)
    key = found.codes_OI.data_ptr()
    if key not in made:
        made[key] = _Blocks(found) if found.format.codebook is None else Codebook(found)
    table = made[key]
    assert isinstance(found, QuantLinear | QuantEmbedding)
    if isinstance(table, Codebook):
        kind = CodebookLinear if isinstance(found, QuantLinear) else CodebookEmbedding
        return kind(found, table)  # type: ignore[arg-type]
    if isinstance(found, QuantLinear):
        return _Linear(found, table)
    return _Embedding(found, table)
