"""Modules with quantized weights (tables.py), and how they come from and go to a checkpoint.

An embedding and a head that share one table share the very same buffers. A tied table is stored
once.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compressor.errors import CompressError
from compressor.model.manifest import WeightFormat
from compressor.model.side import Side, SideLinear, beside
from compressor.model.tables import ROWS, QuantTable
from compressor.numerics.ops import (
    dynamic_int8_linear,
    quant_linear,
    static_int8_linear,
    token_int8_linear,
)
from compressor.numerics.packing import unpack


class QuantLinear(QuantTable):
    """A Linear with quantized weights: float32 x [..., I] -> [..., O].

    Weight-only formats multiply by the dequantized weight; formats with an activation round x to
    8 bits as well (numerics/ops.py). A side path stays float and sees x as it is.

    Attributes:
        input_scale, input_zero: the grid of x, float32 and uint8 scalars, where it is not dynamic.
        factor_I: what x is multiplied by before it is rounded, float32; None: by nothing.
        rounds_input: false while `float_inputs` says so.
    """

    bias: nn.Parameter | None
    side: Side | None
    input_scale: Tensor
    input_zero: Tensor
    factor_I: Tensor | None

    def __init__(
        self, inputs: int, outputs: int, form: WeightFormat, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__(outputs, inputs, form)
        self.in_features, self.out_features = inputs, outputs
        self.register_parameter("bias", bias)
        self.side, self.factor_I, self.rounds_input = None, None, True
        if form.activation is not None:
            self._prepare_input(form, form.activation)

    def _prepare_input(self, form: WeightFormat, activation: dict[str, Any]) -> None:
        """Room for what the format says about x."""
        assert form.bits == 8 and form.symmetric and form.group is None
        assert activation["bits"] == 8 and activation["per"] in ("tensor", "token")
        if not activation["dynamic"]:
            assert activation["per"] == "tensor"
            self.register_buffer("input_scale", torch.ones(()))
            self.register_buffer("input_zero", torch.zeros((), dtype=torch.uint8))
            self.held += ("input_scale", "input_zero")
        if activation.get("scaled"):
            del self.factor_I
            self.register_buffer("factor_I", torch.ones(self.in_features))
            self.held += ("factor_I",)

    @property
    def weight(self) -> Tensor:
        """What x as it comes is multiplied by, rounding of x aside: float32 [O, I], made anew."""
        weight = super().weight
        return weight if self.factor_I is None else weight.mul_(self.factor_I)

    def int8_weight(self) -> Tensor:
        """Signed codes with inputs first, w_IO int8: what integer matrix products take."""
        return (self.codes_OI.to(torch.int16) - 128).to(torch.int8).t()

    def integer_sums(self, levels: Tensor) -> Tensor:
        """sum_i (code - zero) level over inputs that are integers: exact, to be scaled outside."""
        return linear(levels, self.integer_weight())

    def integer_weight(self) -> Tensor:
        """code - zero, float32 [O, I], where there is one zero point for every output."""
        return self.codes_OI.float() - self.zero_OG.float()

    @property
    def scale_O(self) -> Tensor:
        """The one scale of every output, float32."""
        assert self.format.group is None and self.format.codebook is None
        return self.scale_OG[:, 0].float()

    def forward(self, x: Tensor) -> Tensor:
        return beside(self._quantized(x), self.side, x)

    def _quantized(self, x: Tensor) -> Tensor:
        if self.format.activation is not None and not self.rounds_input:
            return linear(x, self.weight, self.bias)
        if self.format.activation is not None:
            return self._with_int8(x if self.factor_I is None else x * self.factor_I)
        if self.format.codebook is not None:
            return linear(x, self.weight.to(x.dtype), self.bias)
        return quant_linear(x, self.codes_OI, self.scale_OG, self.zero_OG, self.bias)

    def _with_int8(self, x: Tensor) -> Tensor:
        assert self.format.activation is not None
        weight = self.int8_weight(), self.scale_OG[:, 0].float()
        if not self.format.activation["dynamic"]:
            return static_int8_linear(x, *weight, self.input_scale, self.input_zero, self.bias)
        per_token = self.format.activation["per"] == "token"
        return (token_int8_linear if per_token else dynamic_int8_linear)(x, *weight, self.bias)


@contextmanager
def float_inputs(module: nn.Module) -> Iterator[None]:
    """Until the block ends, inputs of Linears stay float, whatever their formats say."""
    found = [m for m in module.modules() if isinstance(m, QuantLinear)]
    for layer in found:
        layer.rounds_input = False
    try:
        yield
    finally:
        for layer in found:
            layer.rounds_input = True


class QuantEmbedding(QuantTable):
    """A quantized table of V rows: ids [...] int64 -> float32 [..., H].

    `factor` multiplies what was looked up, as Gemma's embeddings do; a tied head does without.
    """

    def __init__(self, rows: int, columns: int, form: WeightFormat, factor: float = 1.0) -> None:
        super().__init__(rows, columns, form)
        self.num_embeddings, self.embedding_dim, self.factor = rows, columns, factor

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.rows(ids)
        return rows if self.factor == 1.0 else rows * self.factor


def embedding_factor(table: nn.Module) -> float | None:
    """What an embedding multiplies its rows by; None where it computes something else.

    Some positional tables (OPT, Whisper) are subclasses that turn masks or lengths into ids.
    """
    factor = getattr(table, "scalar_embed_scale", None)  # Gemma's
    if factor is None and type(table).forward is nn.Embedding.forward:
        return 1.0
    return factor


def install(module: nn.Module, formats: dict[str, WeightFormat]) -> None:
    """Replace the named Linear and Embedding modules by empty Quant modules of the same shape.

    Biases and side paths are kept. Modules that shared one weight share one quantized table.
    Formats without bits (a sparse float module) are passed over.

    Raises:
        CompressError: a named module does not exist or has no weight matrix of that kind.
    """
    tables: dict[int, QuantTable] = {}
    for name, form in formats.items():
        if form.bits is None:
            continue
        found = _find(module, name)
        weight = found.weight
        if isinstance(found, nn.Linear):
            bias = found.bias
            new = QuantLinear(found.in_features, found.out_features, form, bias)
            new.side = found.side if isinstance(found, SideLinear) else None
        else:
            factor = embedding_factor(found)
            assert factor is not None, f"{name} does more than look up"
            new = QuantEmbedding(found.num_embeddings, found.embedding_dim, form, factor)
        if id(weight) in tables:
            new.share(tables[id(weight)])
        tables[id(weight)] = new
        module.set_submodule(name, new.train(found.training), strict=True)


def _find(module: nn.Module, name: str) -> nn.Linear | nn.Embedding:
    found = dict(module.named_modules(remove_duplicate=False)).get(name)
    if not isinstance(found, nn.Linear | nn.Embedding):
        raise CompressError(
            f"the model has no Linear or Embedding called '{name}', which its formats name",
            "use the manifest.json that was written with these weights",
        )
    return found


def state_from_disk(module: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Fill a model on which `install` was called with what was stored, bit for bit.

    Args:
        module: the model.
        tensors: tensors, or unread slices of files (model/stream.py); read one after another.

    Raises:
        CompressError: tensors are missing, left over, or of another shape or kind.
    """
    own = module.state_dict(keep_vars=True)
    left_over = [name for name in tensors if name not in own]
    filled = {id(own[name]) for name in tensors if name in own}
    missing = [name for name, tensor in own.items() if id(tensor) not in filled]
    if left_over or missing:
        raise CompressError(
            f"the quantized weights do not fit the model: missing {missing[:3]}, "
            f"left over {left_over[:3]}",
            "get weights, config.json and manifest.json from the same place",
        )
    for name, tensor in tensors.items():
        _fill(module, name, own[name], tensor[...])


def _fill(module: nn.Module, name: str, target: Tensor, stored: Tensor) -> None:
    owner, shape = _owner(module, name), list(target.shape)
    is_codes = isinstance(owner, QuantTable) and target is owner.codes_OI
    if is_codes:
        shape[1] = -(-shape[1] * owner.bits // 8)
    exact = isinstance(owner, QuantTable) and name.rpartition(".")[2] in owner.held
    if list(stored.shape) != shape or (exact and stored.dtype != target.dtype):
        raise CompressError(
            f"tensor '{name}' is {stored.dtype} {list(stored.shape)} where the model has "
            f"{target.dtype} {shape}",
            "get weights, config.json and manifest.json from the same place",
        )
    with torch.no_grad():
        if not is_codes:
            target.copy_(stored)
            return
        for rows, packed in zip(target.split(ROWS), stored.split(ROWS), strict=True):
            rows.copy_(unpack(packed, owner.bits, target.shape[1]))
    points = owner.format.points
    if points is not None and int(target.max()) >= points:
        raise CompressError(
            f"tensor '{name}' is damaged: it has code {int(target.max())} of {points} points",
            "copy the directory again",
        )


def _owner(module: nn.Module, tensor_name: str) -> Any:
    return module.get_submodule(tensor_name.rpartition(".")[0])
