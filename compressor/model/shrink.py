"""Cut a model down to the units that were kept, in place.

Source: arXiv 2407.14679 (trimming), without its residual head merging. Rows of the MLP's
input Linears and columns of its output Linear go with a neuron; rows of Q and columns of the
output projection with a query head; rows of K and V with a whole group. For neurons, heads and
layers the result is exactly the model with those units zeroed. A channel of the residual stream
leaves every tensor that touches it, so norms take their statistics over the channels kept; as in
the paper nothing is rescaled for that.

Where the hidden axis sits in each tensor, task heads included, is read off an empty model of the
new sizes rather than off a list: an axis that is shorter there is the hidden axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.model.families import Stack
from compressor.model.model import Model
from compressor.model.shapes import empty_model, resize_config, resized


@dataclass(frozen=True)
class Kept:
    """Sorted indices of what stays; every layer keeps equally many neurons and heads.

    Attributes:
        neurons: for each layer of the original, its MLP neurons.
        heads: for each layer of the original, its query heads. Each group of query heads (those
            that share a key head) keeps equally many, or none: then its key head goes too.
        hidden: channels of the residual stream.
        layers: blocks.
    """

    neurons: Sequence[Sequence[int]]
    heads: Sequence[Sequence[int]]
    hidden: Sequence[int]
    layers: Sequence[int]

    @staticmethod
    def everything(sizes: dict[str, int]) -> "Kept":
        """Keep all units of a model of these sizes."""
        layers = range(sizes["layers"])
        return Kept(
            neurons=[range(sizes["mlp"]) for _ in layers],
            heads=[range(sizes["heads"]) for _ in layers],
            hidden=range(sizes["hidden"]),
            layers=layers,
        )


def shrink(model: Model, kept: Kept) -> None:
    """Remove every unit that is not in `kept`; the config follows, ties and dtypes stay.

    The module afterwards has the names, shapes and attributes of the same class built from the
    new config, so `save_pretrained` writes what plain transformers loads.
    """
    (stack,) = model.family.stacks
    before, groups = model.sizes, [_groups(heads, model.sizes) for heads in kept.heads]
    after = before | {
        "layers": len(kept.layers),
        "mlp": len(kept.neurons[0]),
        "heads": len(kept.heads[0]),
        "kv_heads": len(groups[0]),
        "hidden": len(kept.hidden),
    }
    twin = empty_model(type(model.module), resized(model.family, model.config, after, kept.layers))
    blocks = model.blocks(stack)
    for i in kept.layers:
        _cut_neurons(blocks[i], stack, kept.neurons[i])
        _cut_heads(blocks[i], stack, kept.heads[i], groups[i], before["head_dim"])
    model.base.set_submodule(stack.blocks, nn.ModuleList(blocks[i] for i in kept.layers))
    _cut_hidden(model.module, twin, kept.hidden)
    _copy_attributes(model.module, twin)
    resize_config(model.family, model.config, after, kept.layers)


def _groups(heads: Sequence[int], sizes: dict[str, int]) -> list[int]:
    """Key heads that still serve a query head: query head h reads key head h // group size."""
    size = sizes["heads"] // sizes["kv_heads"]
    served = [head // size for head in heads]
    assert len({served.count(group) for group in served}) == 1, "groups of different sizes"
    return sorted(set(served))


def _cut(parameter: Tensor, axis: int, index: Sequence[int]) -> None:
    """Slice a parameter without replacing it, so that everything tied to it stays tied."""
    if len(index) < parameter.shape[axis]:
        rows = torch.tensor(index, device=parameter.device)
        parameter.data = parameter.data.index_select(axis, rows)


def _cut_outputs(linear: nn.Module, index: Sequence[int]) -> None:
    assert isinstance(linear, nn.Linear)
    _cut(linear.weight, 0, index)
    if linear.bias is not None:
        _cut(linear.bias, 0, index)


def _cut_neurons(block: nn.Module, stack: Stack, neurons: Sequence[int]) -> None:
    for name in stack.mlp_in:
        _cut_outputs(block.get_submodule(name), neurons)
    _cut(block.get_submodule(stack.mlp_out).get_parameter("weight"), 1, neurons)


def _cut_heads(
    block: nn.Module, stack: Stack, heads: Sequence[int], groups: Sequence[int], head_dim: int
) -> None:
    def rows(units: Sequence[int]) -> list[int]:
        return [unit * head_dim + i for unit in units for i in range(head_dim)]

    query, key, value = (block.get_submodule(name) for name in stack.qkv)
    _cut_outputs(query, rows(heads))
    _cut_outputs(key, rows(groups))
    _cut_outputs(value, rows(groups))
    _cut(block.get_submodule(stack.attn_out).get_parameter("weight"), 1, rows(heads))


def _cut_hidden(module: nn.Module, twin: nn.Module, hidden: Sequence[int]) -> None:
    """Slice every axis that is shorter in the twin; tied parameters come up once."""
    wanted = dict(twin.named_parameters())
    found = dict(module.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        for axis, size in enumerate(wanted[name].shape):
            if size != parameter.shape[axis]:
                assert size == len(hidden), f"{name}: axis {axis} is not the hidden axis"
                _cut(parameter, axis, hidden)
        assert parameter.shape == wanted[name].shape, name


def _copy_attributes(module: nn.Module, twin: nn.Module) -> None:
    """Take over what modules cache of the config: in_features, num_heads, layer_idx, ..."""
    twins: dict[str, nn.Module] = dict(twin.named_modules())
    for name, part in module.named_modules():
        for key, value in vars(twins[name]).items():
            if not key.startswith("_") and _is_size(value):
                setattr(part, key, value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float | tuple) and not isinstance(value, bool)
