"""A low-rank side path beside a Linear (SLoRB, arXiv 2407.20584), and the file that holds it.

    y = W x + b + S X x

X either sums every k = I / R consecutive inputs (fixed: nothing is stored), or is a trained
matrix. Both are ordinary parameters: they train, count and are rounded to the stored dtype like
others. They stand in side.safetensors beside the weights, as MODULE.out_OR (S) and MODULE.in_RI
(X, where it is trained), so that whoever reads the weights alone gets the model without them.

Legend: O outputs, I inputs, R rank, that is groups of inputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compressor.errors import CompressError
from compressor.model.beside import TensorFile
from compressor.model.manifest import WeightFormat
from compressor.model.model import Model
from compressor.model.sources import SIDE, check_safetensors
from compressor.model.stream import open_tensors

_OUT, _IN = "out_OR", "in_RI"
_HINT = "restore the whole directory, or run the stage that wrote it again"


class Side(nn.Module):
    """x [..., I] -> S X x [..., O].

    Args:
        out_OR: S.
        in_RI: X; None sums groups of I / R inputs.
    """

    def __init__(self, out_OR: Tensor, in_RI: Tensor | None = None) -> None:
        super().__init__()
        self.out_OR = nn.Parameter(out_OR)
        self.in_RI = None if in_RI is None else nn.Parameter(in_RI)

    @property
    def rank(self) -> int:
        """Width of the path."""
        return self.out_OR.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.in_RI is not None:
            return linear(linear(x, self.in_RI), self.out_OR)
        return linear(x.unflatten(-1, (self.rank, -1)).sum(dim=-1), self.out_OR)


class SideLinear(nn.Linear):
    """A Linear with a side path. It takes over the parameters of the one it replaces."""

    side: Side | None

    def __init__(self, plain: nn.Linear, side: Side) -> None:
        with torch.device("meta"):
            super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        self.weight, self.bias = plain.weight, plain.bias
        self.side = side
        self.train(plain.training)

    def forward(self, x: Tensor) -> Tensor:
        return beside(super().forward(x), self.side, x)


def beside(y: Tensor, side: Side | None, x: Tensor) -> Tensor:
    """What a layer that makes y of x gives with its side path."""
    return y if side is None else y + side(x)


def attach(model: Model, name: str, side: Side) -> None:
    """Give a Linear, float or quantized, a side path; `model.formats` gets its rank."""
    found = model.module.get_submodule(name)
    if isinstance(found, nn.Linear):
        model.module.set_submodule(name, SideLinear(found, side), strict=True)
    else:
        assert hasattr(found, "side"), f"{name} cannot have a side path"
        found.side = side
    form = model.formats.get(name, WeightFormat())
    model.formats[name] = replace(form, side_rank=side.rank)


def sides(module: nn.Module) -> dict[str, Side]:
    """{name of the Linear: its side path}."""
    found = {name: m for name, m in module.named_modules() if isinstance(m, Side)}
    return {name.removesuffix(".side"): side for name, side in found.items()}


def side_tensors(module: nn.Module) -> dict[str, Tensor]:
    """{key in side.safetensors: tensor}."""
    return {
        f"{n}.{k}": t for n, side in sides(module).items() for k, t in side.state_dict().items()
    }


def without_sides(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state without the tensors of side paths: what the file of the weights holds."""
    prefixes = {f"{name}.side" for name in sides(module)}
    return {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] not in prefixes}


@contextmanager
def sides_off(module: nn.Module) -> Iterator[None]:
    """Until the block ends, the model computes without its side paths."""
    found = {module.get_submodule(name): side for name, side in sides(module).items()}
    for owner in found:
        owner.side = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for owner, side in found.items():
            owner.side = side


def drop_sides(model: Model) -> int:
    """Remove all side paths; returns how many there were."""
    found = sides(model.module)
    for name in found:
        model.module.get_submodule(name).side = None  # type: ignore[assignment]
        model.formats[name] = replace(model.formats[name], side_rank=None)
    return len(found)


def write_sides(model: Model, directory: Path, dtype: torch.dtype) -> None:
    """Write side.safetensors where there are side paths."""
    tensors = {
        name: tensor.detach().to(dtype) for name, tensor in side_tensors(model.module).items()
    }
    if tensors:
        TensorFile(tensors, {"holds": "side paths: y = W x + b + S X x"}).write(directory / SIDE)


def read_sides(model: Model, directory: Path, promised: set[str] | None) -> None:
    """Attach what side.safetensors holds; a directory without one has no side paths.

    Args:
        promised: layers that the manifest says have one; None without a manifest.

    Raises:
        CompressError: the file is missing, damaged, of other layers, or of other shapes.
    """
    file = directory / SIDE
    if not file.is_file():
        if promised:
            raise CompressError(f"'{directory.name}' misses {SIDE}, its side paths", _HINT)
        return
    tensors = TensorFile.read(file).tensors
    names = {key.rpartition(".")[0] for key in tensors}
    if promised is not None and names != promised:
        odd = min(names ^ promised)
        raise CompressError(f"{SIDE} and manifest.json do not agree on '{odd}'", _HINT)
    for name in sorted(names):
        parts = {key: tensors.pop(f"{name}.{key}", None) for key in (_OUT, _IN)}
        attach(model, name, _checked(model, name, parts[_OUT], parts[_IN]))
    if tensors:
        raise CompressError(f"{SIDE} holds '{min(tensors)}', which is no side path", _HINT)


def stored_ranks(directory: Path) -> dict[str, WeightFormat]:
    """What `read_sides` will write into formats of a directory without manifest; reads no tensor.

    Raises:
        CompressError: the file is truncated or its header is damaged.
    """
    file, found = directory / SIDE, {}
    if not file.is_file():
        return found
    check_safetensors(file)
    for key, unread in open_tensors([file], mapped=True).items():
        name, _, part = key.rpartition(".")
        if part == _OUT:
            found[name] = WeightFormat(side_rank=unread.get_shape()[-1])
    return found


def _checked(model: Model, name: str, out_OR: Tensor | None, in_RI: Tensor | None) -> Side:
    owner: Any = dict(model.module.named_modules()).get(name)
    if not hasattr(owner, "in_features") or out_OR is None or out_OR.dim() != 2:
        raise CompressError(f"{SIDE} has no side path that fits '{name}'", _HINT)
    outputs, inputs = owner.out_features, owner.in_features
    form, rank = model.formats.get(name), out_OR.shape[1]
    fits = out_OR.shape[0] == outputs and (form is None or form.side_rank in (None, rank))
    fits &= inputs % rank == 0 if in_RI is None else in_RI.shape == (rank, inputs)
    if not fits or not out_OR.is_floating_point():
        raise CompressError(
            f"the side path of '{name}' in {SIDE} is {list(out_OR.shape)}, which does not fit a "
            f"layer of {inputs} inputs and {outputs} outputs",
            _HINT,
        )
    return Side(out_OR.float(), None if in_RI is None else in_RI.float())
