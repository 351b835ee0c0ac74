"""Cut units out of a model in memory: neurons, heads, residual channels, layers.

arXiv 2407.14679, section 2.3 (trimming); heads.py has residual head merging. Rows of the MLP's
input Linears and columns of its output Linear go with a neuron; rows of Q and columns of the
output projection with a query head; rows of K and V with a whole group. For neurons, heads and
layers the result is exactly the model with those units zeroed. A channel of the residual stream
leaves every tensor that touches it (hidden.py says what that does to norms).

Where the hidden axis sits in each tensor, task heads included, is read off an empty model of the
new sizes rather than off a list: an axis that is shorter there is the hidden axis.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.families import Stack, present
from compressor.model.heads import Rows, attention_rows, cross_rows
from compressor.model.hidden import compensate, rescale_norms
from compressor.model.model import Model
from compressor.model.shapes import (
    depth_axis,
    drop_extras,
    empty_model,
    fixed_by,
    resize_config,
    resized,
)


@dataclass(frozen=True)
class KeptStack:
    """Sorted indices of what stays of one stack; all layers keep equally many of each.

    Attributes:
        neurons: for each layer of the original, its MLP neurons.
        heads: for each layer of the original, its query heads. Each group of query heads (those
            that share a key head) keeps equally many, or none: then its key head goes too.
        layers: blocks.
        cross_heads: the heads of cross attention, for a stack that has it.
    """

    neurons: Sequence[Sequence[int]]
    heads: Sequence[Sequence[int]]
    layers: Sequence[int]
    cross_heads: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class Kept:
    """What stays of every stack, and the channels of the residual stream that stay."""

    stacks: tuple[KeptStack, ...]
    hidden: Sequence[int]

    @staticmethod
    def first(model: Model, sizes: dict[str, int]) -> "Kept":
        """Keep the first units of every axis, as many as `sizes` says."""
        before, stacks = model.sizes, []
        group, per_group = (
            before["heads"] // before["kv_heads"],
            sizes["heads"] // sizes["kv_heads"],
        )
        chosen = [g * group + h for g in range(sizes["kv_heads"]) for h in range(per_group)]
        for number, stack in enumerate(model.family.stacks):
            depth = before[depth_axis(number)]
            heads, neurons = [chosen] * depth, [range(sizes["mlp"])] * depth
            layers = range(sizes[depth_axis(number)])
            stacks.append(KeptStack(neurons, heads, layers, heads if stack.cross_qkv else None))
        return Kept(tuple(stacks), range(sizes["hidden"]))

    @staticmethod
    def everything(model: Model) -> "Kept":
        """Keep all units of a model."""
        return Kept.first(model, model.sizes)


def shrink(model: Model, kept: Kept, rescale: bool = False) -> None:
    """Remove every unit that is not in `kept`; the config follows, ties and dtypes stay.

    The module afterwards has the names, shapes and attributes of the same class built from the
    new config, so `save_pretrained` writes what plain transformers loads.

    Args:
        rescale: make an RMSNorm over the channels kept give what it gave over all channels with
            the removed ones at zero; false, as in the paper, leaves norms as they are.

    Raises:
        CompressError: this configuration ties a number to an axis that is cut, or `rescale` is
            asked of a model with LayerNorm.
    """
    before, after = model.sizes, _sizes_after(model, kept)
    _refuse_fixed(model, before, after)
    layers = [stack.layers for stack in kept.stacks]
    if rescale and after["hidden"] < before["hidden"]:
        rescale_norms(model, before["hidden"] / after["hidden"])
    config = resized(model.family, model.config, after, layers)
    twin = empty_model(type(model.module), config)
    drop_extras(twin, model.family, lambda name: getattr(model.base, name, None) is None)
    for stack, chosen in zip(model.family.stacks, kept.stacks, strict=True):
        _cut_stack(model, stack, chosen, before)
    _cut_hidden(model.module, twin, kept.hidden)
    _copy_attributes(model.module, twin)
    resize_config(model.family, model.config, after, layers)
    if after["hidden"] < before["hidden"]:
        compensate(model, before["hidden"])


def _sizes_after(model: Model, kept: Kept) -> dict[str, int]:
    first, before = kept.stacks[0], model.sizes
    depth = {depth_axis(i): len(stack.layers) for i, stack in enumerate(kept.stacks)}
    return (
        before
        | depth
        | {
            "mlp": len(first.neurons[0]),
            "heads": len(first.heads[0]),
            "kv_heads": len(_groups(first.heads[0], before)),
            "hidden": len(kept.hidden),
        }
    )


# what a key of shapes.fixed_by does, and what to do instead
_FIXED = {
    "layers": (
        "scales attention by the number of the layer ({}), so no layer can be removed",
        "keep all layers and prune heads, mlp or hidden",
    ),
    "hidden": (
        "scales its embeddings by the hidden size ({}), so no hidden channel can be removed",
        "keep hidden and prune heads, mlp or layers",
    ),
}


def _refuse_fixed(model: Model, before: dict[str, int], after: dict[str, int]) -> None:
    for axis, (what, hint) in _FIXED.items():
        key = fixed_by(model.config, axis)
        if key is not None and after[axis] < before[axis]:
            raise CompressError(f"this model {what.format(key)}", hint)


def _groups(heads: Sequence[int], sizes: dict[str, int]) -> list[int]:
    """Key heads that still serve a query head: query head h reads key head h // group size."""
    size = sizes["heads"] // sizes["kv_heads"]
    served = [head // size for head in heads]
    assert len({served.count(group) for group in served}) == 1, "groups of different sizes"
    return sorted(set(served))


def _cut_stack(model: Model, stack: Stack, kept: KeptStack, sizes: dict[str, int]) -> None:
    blocks = model.blocks(stack)
    for i in kept.layers:
        _cut_neurons(blocks[i], stack, kept.neurons[i], sizes["mlp"])
        _cut_heads(blocks[i], stack, kept.heads[i], sizes)
        if stack.cross_out is not None:
            assert kept.cross_heads is not None
            heads = kept.cross_heads[i]
            _cut_rows(blocks[i], cross_rows(stack, sizes), (heads,) * 3)
            _cut_columns(blocks[i], stack.cross_out, rows_of(heads, sizes["head_dim"]))
    _move_tables(blocks, stack, kept, sizes["heads"])
    model.base.set_submodule(stack.blocks, nn.ModuleList(blocks[i] for i in kept.layers))


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


def _cut_columns(block: nn.Module, path: str, index: Sequence[int]) -> None:
    _cut(block.get_submodule(path).get_parameter("weight"), 1, index)


def _cut_neurons(block: nn.Module, stack: Stack, neurons: Sequence[int], size: int) -> None:
    for linear in present(block, stack.mlp_in).values():
        parts = [[size * part + n for n in neurons] for part in range(stack.mlp_parts)]
        _cut_outputs(linear, [row for part in parts for row in part])
    _cut_columns(block, stack.mlp_out, neurons)


def rows_of(units: Sequence[int], size: int) -> list[int]:
    """Rows of units of `size` rows each."""
    return [unit * size + i for unit in units for i in range(size)]


def _cut_heads(block: nn.Module, stack: Stack, heads: Sequence[int], sizes: dict[str, int]) -> None:
    groups = _groups(heads, sizes)
    _cut_rows(block, attention_rows(stack, sizes), (heads, groups, groups))
    _cut_columns(block, stack.attn_out, rows_of(heads, sizes["head_dim"]))


def _cut_rows(block: nn.Module, rows: Sequence[Rows], kept: Sequence[Sequence[int]]) -> None:
    """Keep the rows of some units of queries, keys and values; the order of rows stays."""
    chosen: dict[str, list[int]] = {}
    for (path, rows_UD), units in zip(rows, kept, strict=True):
        chosen.setdefault(path, []).extend(rows_UD[list(units)].flatten().tolist())
    for path, index in chosen.items():
        _cut_outputs(block.get_submodule(path), sorted(index))


def _move_tables(blocks: nn.ModuleList, stack: Stack, kept: KeptStack, heads: int) -> None:
    """Cut what the first block owns for all and give it to the block that is first now.

    One table [any, heads] serves every layer, so all layers must keep the same heads.
    """
    first = blocks[kept.layers[0]]
    for path, table in present(blocks[0], stack.head_tables).items():
        if len(kept.heads[0]) < heads:
            assert len({tuple(layer) for layer in kept.heads}) == 1, "a shared position bias"
            _cut(table.get_parameter("weight"), 1, kept.heads[0])
        if first is not blocks[0]:
            owner, _, name = path.rpartition(".")
            target = first.get_submodule(owner)
            setattr(target, name, table)
            for flag in _flags(blocks[0].get_submodule(owner)):
                setattr(target, flag, True)


def _flags(owner: nn.Module) -> Iterator[str]:
    """Attributes that say that a module owns such a table, e.g. has_relative_attention_bias."""
    return (name for name, value in vars(owner).items() if name.startswith("has_") and value)


def _cut_hidden(module: nn.Module, twin: nn.Module, hidden: Sequence[int]) -> None:
    """Slice every axis that is shorter in the twin; tied parameters come up once."""
    wanted = dict(twin.named_parameters())
    found = dict(module.named_parameters())
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
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
