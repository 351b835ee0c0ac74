"""From a goal to sizes: what `parameters: 0.5` means for one architecture, without weights.

Width goes before depth (arXiv 2407.14679, best practice 4): layers stay. Among the shapes that
meet the budget, take the one whose axes shrink most evenly. The residual stream (hidden) stays
too unless the MLP or the heads would fall below a quarter of theirs: embeddings, vector indexes
and the teacher's hidden states then still fit. Dropping layers takes explicit `sizes` or `ratios`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from pydantic import Field, model_validator

from compressor.errors import CompressError
from compressor.model.families import Family
from compressor.model.shapes import check_sizes, count, fits, head_shapes
from compressor.options import options

LEAST = 0.25  # share of the MLP and of the heads that stays before hidden is touched

Shape = dict[str, int]


@options
class TargetSizes:
    """The sizes to prune to; an axis that is not named stays as it is."""

    layers: int | None = Field(None, ge=1, description="transformer blocks (of the encoder)")
    decoder_layers: int | None = Field(
        None, ge=1, description="blocks of an encoder-decoder's decoder"
    )
    heads: int | None = Field(None, ge=1, description="query heads")
    kv_heads: int | None = Field(None, ge=1, description="key and value heads")
    hidden: int | None = Field(None, ge=1, description="width of the residual stream")
    mlp: int | None = Field(None, ge=1, description="MLP neurons")

    @model_validator(mode="after")
    def _names_something(self) -> "TargetSizes":
        if not self.given:
            raise ValueError("sizes names no size; give layers, heads, kv_heads, hidden or mlp")
        return self

    @property
    def given(self) -> Shape:
        """The sizes that were named."""
        return {axis: size for axis, size in asdict(self).items() if size is not None}


@options
class Ratios:
    """The share of each axis that stays; what is not named stays whole, if the family allows."""

    layers: float | None = Field(None, gt=0, le=1, description="of the blocks (of the encoder)")
    decoder_layers: float | None = Field(
        None, gt=0, le=1, description="of the blocks of an encoder-decoder's decoder"
    )
    heads: float | None = Field(None, gt=0, le=1, description="of the query heads")
    hidden: float | None = Field(None, gt=0, le=1, description="of the residual stream's width")
    mlp: float | None = Field(None, gt=0, le=1, description="of the MLP neurons")

    @model_validator(mode="after")
    def _names_something(self) -> "Ratios":
        if not self.given:
            raise ValueError("ratios names no axis; give layers, heads, hidden or mlp")
        return self

    @property
    def given(self) -> dict[str, float]:
        """The shares that were named."""
        return {axis: share for axis, share in asdict(self).items() if share is not None}


class Goal(Protocol):
    """Options that say how far to prune: one of the four goals, and the rounding."""

    @property
    def parameters(self) -> float | None: ...

    @property
    def sizes(self) -> TargetSizes | None: ...

    @property
    def bytes(self) -> int | None: ...

    @property
    def ratios(self) -> Ratios | None: ...

    @property
    def multiple(self) -> int: ...


def sizes_for(family: Family, config: Any, goal: Goal) -> Shape:
    """`target_sizes` of the options of a pruning method."""
    return target_sizes(
        family,
        config,
        parameters=goal.parameters,
        sizes=goal.sizes,
        bytes=goal.bytes,
        ratios=goal.ratios,
        multiple=goal.multiple,
    )


def target_sizes(
    family: Family,
    config: Any,
    *,
    parameters: float | None = None,
    sizes: TargetSizes | None = None,
    bytes: int | None = None,
    ratios: Ratios | None = None,
    multiple: int = 8,
) -> Shape:
    """Resolve one of four goals to {hidden, layers, heads, kv_heads, head_dim, mlp, vocabulary}.

    Args:
        parameters: share of the original's parameters that may stay, embeddings included.
        sizes: explicit sizes.
        bytes: size of the weights on disk, in bytes, in the config's dtype.
        ratios: share of each axis, rounded to the nearest sizes that fit.
        multiple: all but explicit sizes round the MLP down to a multiple of this.

    Raises:
        CompressError: the sizes or the budget cannot be met; the hint names the nearest.
    """
    assert sum(goal is not None for goal in (parameters, sizes, bytes, ratios)) == 1
    before = family.read_sizes(config)
    if sizes is not None:
        refuse_absent(family, before, sizes.given)
        after = complete(before, sizes.given)
        check_sizes(family, before, after)
        return after
    if ratios is not None:
        refuse_absent(family, before, ratios.given)
        return _nearest_to(family, before, ratios.given, multiple)
    total = count(family, config, before)
    if parameters is not None:
        return _meet(family, config, int(total * parameters), multiple)
    assert bytes is not None
    return _meet(family, config, parameters_in(bytes, total, config, "prune.minitron"), multiple)


def parameters_in(bytes: int, total: int, config: Any, method: str) -> int:
    """How many parameters a number of bytes holds, in the config's dtype.

    Raises:
        CompressError: the `total` of the original already fits, so `method` has nothing to do.
    """
    width = itemsize(config)
    if bytes >= total * width:
        raise CompressError(
            f"the model already takes {total * width:,} bytes, within the budget of {bytes:,}",
            f"give a smaller number of bytes, or leave {method} out",
        )
    return bytes // width


def _nearest_to(family: Family, before: Shape, given: dict[str, float], multiple: int) -> Shape:
    """Shares of axes as sizes: the MLP rounded down, heads and hidden to the nearest that fit.

    Groups stay, as in a budget. Distances are of logarithms, half as large for an axis that was not
    named; between equal ones, the wider.
    """
    wanted = {axis: max(before[axis] * share, 1.0) for axis, share in given.items()}
    shape = before | {axis: round(size) for axis, size in wanted.items()}
    if given.get("mlp", 1) < 1:
        shape["mlp"] = max(int(wanted["mlp"]) // multiple * multiple, min(multiple, before["mlp"]))
    asked = {axis: wanted.get(axis, before[axis]) for axis in ("heads", "hidden")}

    def distance(found: Shape) -> tuple[float, int]:
        moves = {axis: abs(math.log(found[axis] / size)) for axis, size in asked.items()}
        far = sum(move if axis in given else move / 2 for axis, move in moves.items())
        return round(far, 9), -found["heads"] * found["hidden"]

    alone = before["heads"] == before["kv_heads"]
    fitting = head_shapes(family, before, shape)
    return min(
        (s for s in fitting if s["kv_heads"] == (s["heads"] if alone else before["kv_heads"])),
        key=distance,
    )


def refuse_absent(family: Family, before: Shape, given: Mapping[str, float]) -> None:
    """Refuse an axis that the family lacks."""
    if "kv_heads" in given and family.sizes.kv_heads is None:
        raise CompressError(
            f"{family.model_type} has no kv_heads: every head has its own key and value",
            "write heads only",
        )
    if absent := given.keys() - before.keys():
        raise CompressError(
            f"{family.model_type} has no {', '.join(sorted(absent))}: it is no encoder-decoder",
            "write layers only",
        )


def itemsize(config: Any) -> int:
    """Bytes per stored parameter; transformers reads a config without dtype as float32."""
    return config.dtype.itemsize if config.dtype is not None else 4


def complete(before: Shape, given: Shape) -> Shape:
    """Without grouped queries a key head is a query head, so kv_heads follow heads."""
    after = before | given
    if before["heads"] == before["kv_heads"]:
        after["kv_heads"] = given.get("kv_heads", after["heads"])
        after["heads"] = given.get("heads", after["kv_heads"])
    return after


def _meet(family: Family, config: Any, budget: int, multiple: int) -> Shape:
    """The most even shape of at most `budget` parameters, of full hidden size where possible."""
    before = family.read_sizes(config)

    def filled(widths: list[Shape]) -> list[Shape]:
        return [s for w in widths if (s := _fill_mlp(family, config, w, budget, multiple))]

    def unevenness(after: Shape) -> tuple[float, int]:
        moved = [axis for axis in ("mlp", "heads", "hidden") if after[axis] < before[axis]]
        logs = [math.log(after[axis] / before[axis]) for axis in {"mlp", "heads", *moved}]
        return max(logs) - min(logs), -after["mlp"]

    widths = list(_widths(family, before))
    full = [w for w in widths if w["hidden"] == before["hidden"]]
    gentle = [
        s
        for s in filled(full)
        if min(s["mlp"] / before["mlp"], s["heads"] / before["heads"]) >= LEAST
    ]
    if shapes := gentle or filled(widths):
        return min(shapes, key=unevenness)
    least = min(multiple, before["mlp"])
    smallest = min(count(family, config, w | {"mlp": least}) for w in widths)
    share = math.ceil(1000 * smallest / count(family, config, before)) / 1000
    raise CompressError(
        f"no {family.model_type} of {before['layers']} layers fits into {budget:,} parameters",
        f"the smallest has {smallest:,}: write parameters: {share} or bytes: "
        f"{smallest * itemsize(config)} or more, or drop layers with sizes: {{layers: ...}}",
    )


def _widths(family: Family, before: Shape) -> Iterator[Shape]:
    """Shapes with fewer heads or a narrower residual stream, in steps of one head's width.

    Groups stay (Minitron keeps all of them): only heads inside each group go, unless every
    query head has its own key head.
    """
    own_keys = before["heads"] == before["kv_heads"]
    widths = range(before["hidden"], 0, -before["head_dim"])
    for hidden in widths:
        for heads in range(before["heads"], 0, -1):
            kv_heads = heads if own_keys else before["kv_heads"]
            shape = before | {"hidden": hidden, "heads": heads, "kv_heads": kv_heads}
            if fits(family, before, shape):
                yield shape


def _fill_mlp(
    family: Family, config: Any, shape: Shape, budget: int, multiple: int
) -> Shape | None:
    """The widest MLP that keeps `shape` in the budget, or None; the count is affine in it."""
    whole = shape["mlp"]
    fixed = count(family, config, shape | {"mlp": 1})
    step = count(family, config, shape | {"mlp": 2}) - fixed
    room = 1 + (budget - fixed) // step
    mlp = whole if room >= whole else room // multiple * multiple
    return shape | {"mlp": mlp} if mlp >= 1 else None
