"""Which sizes an architecture can have, and what a model of given sizes looks like.

Everything here works from a config and a row of the family table; no weight is ever read.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from compressor.errors import CompressError
from compressor.model.conv1d import to_linear
from compressor.model.count import count_parameters
from compressor.model.families import Family, find_family
from compressor.model.model import TASKS

# what pruning may shrink; decoder_layers is the depth of the second stack, where there is one
AXES = ("layers", "decoder_layers", "heads", "kv_heads", "hidden", "mlp")
# config keys with which a size is part of the arithmetic, so that nothing can be cut there
_FIXED_BY = {"layers": "scale_attn_by_inverse_layer_idx", "hidden": "scale_embedding"}


def fixed_by(config: Any, axis: str) -> str | None:
    """The config key that ties a number to an axis, which can then not be cut; or None."""
    key = _FIXED_BY.get(axis, "")
    return key if getattr(config, key, False) else None


def depth_axis(number: int) -> str:
    """The axis that counts the blocks of stack `number` (from 0)."""
    return ("layers", "decoder_layers")[number]


def axes_of(sizes: dict[str, int]) -> list[str]:
    """The axes of AXES that a model has."""
    return [axis for axis in AXES if axis in sizes]


def resize_config(
    family: Family, config: Any, sizes: dict[str, int], layers: Sequence[Sequence[int]]
) -> None:
    """Write `sizes` into a config, in place.

    head_dim is written explicitly where the architecture has the key: after pruning it can no
    longer be inferred as hidden / heads.

    Args:
        layers: for each stack, the old indices of the layers kept.
    """
    for number, kept in enumerate(layers):
        assert len(kept) == sizes[depth_axis(number)]
    for axis in (*axes_of(sizes), "head_dim"):
        keys = getattr(family.sizes, axis)
        for key in (keys,) if isinstance(keys, str) else keys or ():
            setattr(config, key, sizes[axis])
    kinds = getattr(config, "layer_types", None)  # transformers' per-layer attention kinds
    if kinds is not None:
        config.layer_types = [kinds[i] for i in layers[0]]


def resized(
    family: Family,
    config: Any,
    sizes: dict[str, int],
    layers: Sequence[Sequence[int]] | None = None,
) -> Any:
    """Return a copy of a config with other sizes; the first layers are kept unless named."""
    changed = copy.deepcopy(config)
    if layers is None:
        layers = [range(sizes[depth_axis(i)]) for i in range(len(family.stacks))]
    resize_config(family, changed, sizes, layers)
    return changed


def config_of(raw: dict[str, Any]) -> Any:
    """The transformers config of a config.json; remote code is ignored.

    Raises:
        CompressError: unknown architecture, or values that make no model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    import compressor.model.qsd_modeling  # noqa: F401  # registers what transformers does not ship

    try:
        config = AutoConfig.for_model(**{k: v for k, v in raw.items() if k != "auto_map"})
    # some values are validated by transformers, over others its code trips
    except (StrictDataclassError, AttributeError, ArithmeticError, TypeError, ValueError) as error:
        reason = str(error).rpartition("\n")[2].strip()
        raise CompressError(
            f"config.json makes no {raw['model_type']} model: {reason}", "restore the file"
        ) from error
    _check_heads(find_family(raw["model_type"]), config)
    return config


def _check_heads(family: Family, config: Any) -> None:
    keys = family.sizes
    hidden, heads = family.read(config, keys.hidden), family.read(config, keys.heads)
    kv_heads = getattr(config, keys.kv_heads) if keys.kv_heads else heads
    explicit = bool(keys.head_dim) and getattr(config, keys.head_dim, None) is not None
    uneven = not explicit and heads > 0 and hidden % heads
    if min(hidden, heads, kv_heads) < 1 or uneven or heads % kv_heads:
        raise CompressError(
            f"config.json makes no {family.model_type} model: {hidden} hidden, {heads} heads and "
            f"{kv_heads} key-value heads, of which each must divide the one before",
            "restore the file",
        )


def model_class(family: Family, config: Any) -> Any:
    """The transformers class a config was saved by, or the family's auto class without one.

    Raises:
        CompressError: the config names a class that transformers does not have, or one with a
            head of which nothing here knows what it is for.
    """
    import transformers  # seconds to import, and this module is read by `compress methods`

    from compressor.model.qsd_modeling import CLASSES

    if not config.architectures:
        return getattr(transformers, family.auto_class)._model_mapping[type(config)]
    name = config.architectures[0]
    found = CLASSES.get(name, getattr(transformers, name, None))
    if found is None:
        raise CompressError(
            f"transformers has no class '{name}', which config.json asks for",
            "use a checkpoint of a class that transformers itself ships",
        )
    auto: Any = transformers.AutoModel
    bare = auto._model_mapping[type(config)].__name__
    stem = bare.removesuffix("Model").removesuffix("Text")
    heads = [stem + suffix for suffix, task in TASKS if _takes(family, task)]
    supported = [bare, *(h for h in heads if h in CLASSES or hasattr(transformers, h))]
    if name not in supported:
        raise CompressError(
            f"models of the class {name} are not supported, only {', '.join(supported)}",
            f"save the part you need as one of these: {bare}.from_pretrained(DIR)"
            ".save_pretrained(NEW_DIR)",
        )
    return found


def _takes(family: Family, task: str) -> bool:
    """Encoders also exist as decoders (BertLMHeadModel), and decoders of pairs alone: not here."""
    if len(family.stacks) > 1:
        return "seq2seq" in task
    return task != "causal-lm" or family.auto_class == "AutoModelForCausalLM"


def empty_model(cls: type[nn.Module], config: Any) -> nn.Module:
    """A model on the meta device: every name, shape and tie, no memory, milliseconds."""
    with torch.device("meta"):
        return to_linear(cls(copy.deepcopy(config)))


def drop_extras(module: Any, family: Family, absent: Callable[[str], bool]) -> None:
    """Remove extra modules of a family (a pooler) for whose name `absent` holds."""
    for name in {extra.partition(".")[0] for extra in family.extras}:
        if absent(name):
            setattr(module.base_model, name, None)


def count(family: Family, config: Any, sizes: dict[str, int]) -> int:
    """Parameters (ties once) of the config's class at other sizes."""
    return count_parameters(
        empty_model(model_class(family, config), resized(family, config, sizes))
    )


def fits(family: Family, before: dict[str, int], after: dict[str, int]) -> bool:
    """Whether `after` keeps the family's shape rule and can be cut out of `before`.

    Cutting needs query groups that exist: heads a multiple of kv_heads, and no more query heads
    per group than before.
    """
    heads, kv_heads, hidden = after["heads"], after["kv_heads"], after["hidden"]
    if any(not 1 <= after[axis] <= before[axis] for axis in axes_of(before)):
        return False
    if heads % kv_heads or heads // kv_heads > before["heads"] // before["kv_heads"]:
        return False
    if family.shape_rule == "heads divides hidden":
        return hidden % heads == 0
    if family.shape_rule == "hidden = heads x head_dim":
        return hidden == heads * before["head_dim"]
    return True


def check_sizes(family: Family, before: dict[str, int], after: dict[str, int]) -> None:
    """Refuse sizes that cannot be pruned to, naming the nearest that can.

    Raises:
        CompressError: a size exceeds the original, or the shape rule is broken.
    """
    for axis in axes_of(before):
        if not 1 <= after[axis] <= before[axis]:
            raise CompressError(
                f"sizes: {axis} {after[axis]} is outside 1 .. {before[axis]}, the original's",
                f"write {axis}: {min(max(after[axis], 1), before[axis])} or less",
            )
    if not fits(family, before, after):
        raise misfit(family, before, [after])


def misfit(
    family: Family, before: dict[str, int], shapes: Sequence[dict[str, int]]
) -> CompressError:
    """What is wrong with sizes of which none fits: why, of those that come nearest to fitting."""
    distance, after, nearest = math.inf, shapes[0], []
    for shape in {tuple(s[axis] for axis in _head_axes(family)): s for s in shapes}.values():
        found = _nearest(family, before, shape)
        if found and found[0][0] < distance:
            distance, after, nearest = found[0][0], shape, [near for _, near in found]
    return CompressError(
        f"sizes {_show(family, after)} do not fit {family.model_type}: "
        f"{_explain(family, before, after)}",
        f"nearest that fit: {' or '.join(_show(family, shape) for shape in nearest)}",
    )


def _explain(family: Family, before: dict[str, int], after: dict[str, int]) -> str:
    """The rules that `after` breaks."""
    heads, kv_heads, hidden = after["heads"], after["kv_heads"], after["hidden"]
    group, dim = before["heads"] // before["kv_heads"], before["head_dim"]
    broken = []
    if family.shape_rule == "heads divides hidden" and hidden % heads:
        broken.append("heads must divide hidden")
    if family.shape_rule == "hidden = heads x head_dim" and hidden != heads * dim:
        broken.append(f"hidden must be heads x {dim}")
    if heads % kv_heads or heads // kv_heads > group:
        broken.append(f"each of the kv_heads must serve the same 1 .. {group} heads")
    return " and ".join(broken)


def _head_axes(family: Family) -> list[str]:
    return ["heads", "hidden"] + ["kv_heads"] * (family.sizes.kv_heads is not None)


def _show(family: Family, sizes: dict[str, int]) -> str:
    return "{" + ", ".join(f"{axis}: {sizes[axis]}" for axis in _head_axes(family)) + "}"


def _nearest(
    family: Family, before: dict[str, int], after: dict[str, int], n: int = 3
) -> list[tuple[float, dict[str, int]]]:
    """(distance, shape) of the n closest that fit; what the user changed weighs twice as much."""

    def distance(shape: dict[str, int]) -> float:
        total = 0.0
        for axis in _head_axes(family):
            weight = 0.5 if after[axis] == before[axis] else 1.0
            change = abs(math.log(shape[axis] / after[axis]))
            total += weight * change + 0.1 * (change > 0)  # one axis moved beats two
        return total

    found = ((distance(shape), shape) for shape in head_shapes(family, before, after))
    return sorted(found, key=lambda pair: pair[0])[:n]


def head_shapes(
    family: Family, before: dict[str, int], like: dict[str, int]
) -> Iterator[dict[str, int]]:
    """Every shape that fits and differs from `like` in heads, kv_heads and hidden only.

    hidden is tried as it is in `like` and at the multiples of heads on both sides of it, which
    is enough to hold the nearest one under every shape rule.
    """
    for heads in range(1, before["heads"] + 1):
        low = like["hidden"] // heads * heads
        tried = {like["hidden"], low, low + heads, heads * before["head_dim"]}
        for kv_heads in range(1, min(heads, before["kv_heads"]) + 1):
            for hidden in sorted(tried):
                shape = like | {"heads": heads, "kv_heads": kv_heads, "hidden": hidden}
                if fits(family, before, shape):
                    yield shape
