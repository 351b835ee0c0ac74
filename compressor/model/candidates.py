"""The architectures that meet a budget: a grid over the axes, its MLP filled to the budget.

arXiv 2407.14679, section 3: enumerate depths, heads, residual widths and MLP widths, and keep what
lies within 5 % of the budget. There the four lists are written by hand. Here a list that is not
given is

    layers, decoder_layers   all of them down to three quarters
    heads, hidden            eighths from the whole down to a quarter, as the shape rule allows
    kv_heads                 as they are; those of heads where every head has its own
    mlp                      the multiple of `multiple` that comes nearest to the budget, and at
                             least a quarter of the original's wherever that leaves any shape

A grid holds more shapes than anybody wants to train, so `spread` picks a few that are unlike each
other. No weight is read: parameters are counted on empty models of one and two layers.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Protocol

from compressor.errors import CompressError
from compressor.model.budget import LEAST, Shape, complete, itemsize, parameters_in, refuse_absent
from compressor.model.families import Family
from compressor.model.shapes import axes_of, count, fits, fixed_by, misfit

_SHALLOW = 0.75  # share of the layers that stays, at least, unless a list says otherwise
_STEPS = 8
_LETTERS = {"layers": "l", "decoder_layers": "dl", "heads": "h", "kv_heads": "kv"}
_LETTERS |= {"hidden": "d", "mlp": "m"}


class Space(Protocol):
    """Options that span a grid; a list that is None takes its default."""

    @property
    def parameters(self) -> float | None: ...

    @property
    def bytes(self) -> int | None: ...

    @property
    def tolerance(self) -> float: ...

    @property
    def lists(self) -> dict[str, tuple[int, ...]]: ...

    @property
    def multiple(self) -> int: ...

    @property
    def candidates(self) -> int: ...


def candidates_for(family: Family, config: Any, space: Space) -> list[Shape]:
    """At most `space.candidates` shapes within the budget of parameters or bytes, as `spread`.

    Raises:
        CompressError: a list holds an impossible size, or no shape of the grid meets the budget;
            the hint names the nearest that does.
    """
    return spread(family.read_sizes(config), within_budget(family, config, space), space.candidates)


def within_budget(family: Family, config: Any, space: Space) -> list[Shape]:
    """Every shape of the grid whose parameters are within the tolerance of the budget.

    Raises:
        CompressError: as `candidates_for`.
    """
    before, budget = family.read_sizes(config), budget_of(family, config, space)
    counts = Counts(family, config)
    near = [
        (abs(counts(shape) / budget - 1), shape)
        for cell in grid(family, config, space)
        for shape in filled(cell, counts, budget, space)
    ]
    found = [s for distance, s in near if distance <= space.tolerance and s != before]
    if not found:
        raise _out_of_reach(near, counts, budget, space, itemsize(config))
    return found if "mlp" in space.lists else _gentle(before, found)


def budget_of(family: Family, config: Any, space: Space) -> int:
    """The budget as a number of parameters.

    Raises:
        CompressError: the model already takes fewer bytes.
    """
    total = Counts(family, config)(family.read_sizes(config))
    if space.parameters is not None:
        return int(total * space.parameters)
    assert space.bytes is not None
    return parameters_in(space.bytes, total, config, "search.minitron")


def grid(family: Family, config: Any, space: Space) -> list[Shape]:
    """Every combination of depth, heads and hidden that can be cut out, with the whole MLP.

    Raises:
        CompressError: a list names an axis that the model lacks or a size outside 1 .. its own,
            or nothing in the lists keeps the family's shape rule.
    """
    before, lists = family.read_sizes(config), space.lists
    refuse_absent(family, before, {axis: sizes[0] for axis, sizes in lists.items()})
    for axis, sizes in lists.items():
        if outside := [size for size in sizes if not 1 <= size <= before[axis]]:
            raise CompressError(
                f"{axis}: {outside[0]} is outside 1 .. {before[axis]}, the original's",
                f"{axis}: [{before[axis]}, ...]",
            )
    depths = [axis for axis in ("layers", "decoder_layers") if axis in before]
    choices = [lists.get(axis) or _depths(before[axis], axis, config) for axis in depths]
    tried = [
        width | dict(zip(depths, chosen, strict=True))
        for chosen in product(*choices)
        for width in _widths(before, lists, config)
    ]
    found = list({_key(s): s for s in tried if fits(family, before, s)}.values())
    if not found:
        error = misfit(family, before, tried)
        raise CompressError(f"no combination of the lists fits: {error.what}", error.hint)
    return found


def spread(before: Shape, shapes: Sequence[Shape], n: int) -> list[Shape]:
    """At most n shapes that are unlike each other (farthest-point sampling, Gonzalez 1985).

    The first is the one whose axes shrink most evenly; each next one is the farthest from its
    nearest neighbour among those taken. A shape is the point of the logarithms of what stays of
    each axis. Equal distances go to the earlier shape, so the same grid gives the same choice.
    """

    def unevenness(shape: Shape) -> float:
        place = _place(before, shape)
        return max(place) - min(place)

    ordered = sorted(shapes, key=unevenness)
    places = [_place(before, shape) for shape in ordered]
    gaps, taken = [math.inf] * len(ordered), []
    while len(taken) < min(n, len(ordered)):
        index = gaps.index(max(gaps))
        taken.append(ordered[index])
        gaps = [min(gap, math.dist(p, places[index])) for gap, p in zip(gaps, places, strict=True)]
        gaps[index] = -1.0  # equal shapes may have a gap of 0 and are still to be taken
    return taken


def label(shape: Shape) -> str:
    """A short name, e.g. l4-h8-kv2-d64-m160; kv only where heads share keys."""
    shared = shape["heads"] != shape["kv_heads"]
    axes = [axis for axis in axes_of(shape) if axis != "kv_heads" or shared]
    return "-".join(f"{_LETTERS[axis]}{shape[axis]}" for axis in axes)


class Counts:
    """Parameters of any shape, from models of one and two layers.

    The count is affine in the depth of each stack, and the share of a layer affine in its MLP, so
    few counts per width serve a whole grid.
    """

    def __init__(self, family: Family, config: Any) -> None:
        self.family, self.config = family, config
        self.known: dict[tuple[int, ...], tuple[list[list[int]], list[str]]] = {}

    def __call__(self, shape: Shape) -> int:
        """Parameters of a shape, ties once."""
        base, per_neuron = self.line(shape)
        return base + per_neuron * shape["mlp"]

    def line(self, shape: Shape) -> tuple[int, int]:
        """(parameters without an MLP neuron, parameters of one neuron in all layers)."""
        rows, depths = self._corner(shape)
        base, slope = rows[0]
        for (more, more_slope), axis in zip(rows[1:], depths, strict=True):
            base += (shape[axis] - 1) * (more - rows[0][0])
            slope += (shape[axis] - 1) * (more_slope - rows[0][1])
        return base, slope

    def _corner(self, shape: Shape) -> tuple[list[list[int]], list[str]]:
        """Lines of the shallowest model, and of those with one layer more in one stack."""
        key = shape["hidden"], shape["heads"], shape["kv_heads"]
        if key not in self.known:
            depths = [axis for axis in ("layers", "decoder_layers") if axis in shape]
            shallow = shape | dict.fromkeys(depths, 1)
            models = [shallow, *(shallow | {axis: 2} for axis in depths)]
            self.known[key] = [self._measure(model) for model in models], depths
        return self.known[key]

    def _measure(self, shape: Shape) -> list[int]:
        one, two = (count(self.family, self.config, shape | {"mlp": mlp}) for mlp in (1, 2))
        return [one - (two - one), two - one]


def _key(shape: Shape) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in axes_of(shape))


def _place(before: Shape, shape: Shape) -> list[float]:
    return [math.log(shape[axis] / before[axis]) for axis in axes_of(before) if axis != "kv_heads"]


def _depths(whole: int, axis: str, config: Any) -> list[int]:
    least = whole if fixed_by(config, axis) else math.ceil(whole * _SHALLOW)
    return list(range(whole, least - 1, -1))


def _widths(before: Shape, lists: dict[str, tuple[int, ...]], config: Any) -> Iterator[Shape]:
    """Heads, key heads and hidden in all combinations, whether they fit the shape rule or not."""
    whole = before["hidden"]
    steps = [whole] if fixed_by(config, "hidden") else _eighths(whole, before["head_dim"])
    grouped = before["heads"] != before["kv_heads"]
    for hidden in lists.get("hidden") or steps:
        if not grouped and "heads" not in lists and "kv_heads" not in lists:
            given: Iterator[Shape] = ({"heads": heads} for heads in _eighths(before["heads"]))
        else:
            given = _heads(before, lists, grouped)
        for heads in given:
            yield complete(before, heads) | {"hidden": hidden}


def _heads(before: Shape, lists: dict[str, tuple[int, ...]], grouped: bool) -> Iterator[Shape]:
    """Combinations of the lists of heads and kv_heads; groups shrink evenly without a list."""
    if not grouped:
        axes = [axis for axis in ("heads", "kv_heads") if axis in lists]
        yield from (dict(zip(axes, s, strict=True)) for s in product(*(lists[a] for a in axes)))
        return
    per_group = _eighths(before["heads"] // before["kv_heads"])
    for kv_heads in lists.get("kv_heads") or [before["kv_heads"]]:
        for heads in lists.get("heads") or [kv_heads * each for each in per_group]:
            yield {"heads": heads, "kv_heads": kv_heads}


def _eighths(whole: int, unit: int = 1) -> list[int]:
    """Multiples of `unit` near the eighths of `whole`, from the whole down to a quarter of it."""
    steps = (round(whole * part / _STEPS / unit) * unit for part in range(_STEPS, 1, -1))
    return [size for size in dict.fromkeys([whole, *steps]) if 1 <= size <= whole]


def filled(cell: Shape, counts: Counts, budget: int, space: Space) -> list[Shape]:
    """The shapes of a cell: with every MLP of the list, or with the one nearest to the budget."""
    if "mlp" in space.lists:
        return [cell | {"mlp": mlp} for mlp in space.lists["mlp"]]
    base, per_neuron = counts.line(cell)
    return [cell | {"mlp": nearest_width((budget - base) / per_neuron, cell["mlp"], space)}]


def nearest_width(exact: float, whole: int, space: Space) -> int:
    """The MLP nearest to `exact` neurons: a multiple of `space.multiple`, or the whole of it."""
    lower = math.floor(exact / space.multiple) * space.multiple
    widths = [min(max(w, space.multiple), whole) for w in (lower, lower + space.multiple)]
    return min(widths, key=lambda width: abs(width - exact))


def _gentle(before: Shape, shapes: list[Shape]) -> list[Shape]:
    """Those that keep a quarter of the MLP, where there are any."""
    return [s for s in shapes if s["mlp"] >= LEAST * before["mlp"]] or shapes


def _out_of_reach(
    near: list[tuple[float, Shape]], counts: Counts, budget: int, space: Space, width: int
) -> CompressError:
    whole = counts.family.read_sizes(counts.config)
    others = [pair for pair in near if pair[1] != whole]
    if not others:
        return CompressError(
            "the lists hold the original's shape alone", "give smaller sizes in one of them"
        )
    distance, shape = min(others, key=lambda pair: pair[0])
    found, tolerance = counts(shape), math.ceil(1000 * distance) / 1000
    if space.bytes is not None:
        option = f"bytes: {found * width}"
    else:
        option = f"parameters: {round(found / counts(whole), 4)}"
    return CompressError(
        f"no shape in these lists is within {space.tolerance:.1%} of {budget:,} parameters",
        f"the nearest, {label(shape)}, has {found:,}: write {option}"
        + (f" or tolerance: {tolerance}" if tolerance < 1 else "")
        + ", or give other lists",
    )
