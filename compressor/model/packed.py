"""Sparse weights in a file without their zeros, and back.

A weight NAME [O, I] that is small without its zeros is stored as three tensors, in one of the two
layouts of numerics/sparse_packing.py; which one is told by the tensors that are there:

    NAME.shape int64 [2] = (O, I), NAME.values, and NAME.mask (bitmask) or NAME.index (N:M)

NAME is the weight's name in the file that transformers would have, but rows are always outputs:
also in GPT-2, where transformers stores the inputs first.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.errors import CompressError
from compressor.model.stream import Lazy, read_tensor
from compressor.numerics.masks import fits, group_of, most_in_a_group
from compressor.numerics.sparse_packing import (
    index_bits,
    index_bytes,
    pack_bitmask,
    pack_groups,
    unpack_bitmask,
    unpack_groups,
)

SHAPE, VALUES, MASK, INDEX = "shape", "values", "mask", "index"
_FLOATS = ("F64", "F32", "F16", "BF16")


def packed_state(state: Mapping[str, Lazy], patterns: Mapping[str, str]) -> dict[str, Lazy]:
    """A state in which sparse weights are stored without their zeros, where that is smaller.

    Every weight that has a pattern is made once to count what it keeps, and again whenever a part
    of it is written, so that never more than one is in memory.

    Args:
        state: {name in the file: weight [O, I] or any other tensor}.
        patterns: {name in the file: "unstructured" or "N:M"} of the sparse weights.
    """
    found: dict[str, Lazy] = {}
    for name, lazy in state.items():
        if name not in patterns:
            found[name] = lazy
            continue
        smallest = min(_layouts(lazy, patterns[name]), key=_bytes)  # of equals, the first
        found |= {f"{name}.{part}" if part else name: part_of for part, part_of in smallest.items()}
    return found


def _bytes(parts: dict[str, Lazy]) -> int:
    return sum(lazy.bytes for lazy in parts.values())


def _layouts(weight: Lazy, pattern: str) -> list[dict[str, Lazy]]:
    """The forms {part: tensor} a weight can have: dense, N:M where it is possible, bitmask."""
    (outputs, inputs), dtype, group = weight.shape, weight.dtype, group_of(pattern)
    w_OI = weight.make()
    shape = Lazy((2,), torch.int64, lambda: torch.tensor([outputs, inputs]))
    found = [{"": weight}]
    if group and fits(inputs, pattern) and index_bits(group[1]):
        n, m = group
        if most_in_a_group(w_OI, m) <= n:
            make = lambda part: pack_groups(weight.make(), n, m)[part]  # noqa: E731
            index = (outputs, index_bytes(inputs // m, n, m))
            values = (outputs, inputs // m, n)
            found.append(_parts(INDEX, index, values, dtype, shape, make))
    make = lambda part: pack_bitmask(weight.make())[part]  # noqa: E731
    mask, values = (outputs, -(-inputs // 8)), (int(w_OI.count_nonzero()),)
    return [*found, _parts(MASK, mask, values, dtype, shape, make)]


def _parts(
    places: str,
    places_shape: tuple[int, ...],
    values_shape: tuple[int, ...],
    dtype: torch.dtype,
    shape: Lazy,
    make: Any,
) -> dict[str, Lazy]:
    return {
        SHAPE: shape,
        places: Lazy(places_shape, torch.uint8, partial(make, 0)),
        VALUES: Lazy(values_shape, dtype, partial(make, 1)),
    }


@dataclass(frozen=True)
class PackedSlice:
    """A weight that is stored without zeros, unread; used like a slice of a safetensors file.

    `slice[...]` gives the dense weight, inputs first where `turned`.
    """

    name: str
    parts: Mapping[str, Any]
    shape: tuple[int, int]
    turned: bool

    def get_shape(self) -> list[int]:
        """Shape of the dense weight as `slice[...]` gives it."""
        return list(self.shape[::-1] if self.turned else self.shape)

    def get_dtype(self) -> str:
        """Its dtype in the words of safetensors: "F32", "BF16"."""
        return self.parts[VALUES].get_dtype()

    def __getitem__(self, key: Any) -> Tensor:
        values = read_tensor(self.parts[VALUES])
        try:
            if MASK in self.parts:
                dense = unpack_bitmask(read_tensor(self.parts[MASK]), values, self.shape[1])
            else:
                m = self.shape[1] // values.shape[1]
                dense = unpack_groups(read_tensor(self.parts[INDEX]), values, m)
        except ValueError as error:
            raise _damaged(self.name, str(error)) from error
        return (dense.t() if self.turned else dense)[key]


def dense_view(tensors: Mapping[str, Any], turned: Collection[str] = ()) -> dict[str, Any]:
    """The slices of a packed file with every weight under its own name, dense when it is read.

    Args:
        tensors: {name: slice} of model/stream.py.
        turned: names of weights that the reader wants with inputs first.

    Raises:
        CompressError: parts of a weight are missing or do not fit each other; what only shows
            in their content is raised when the weight is read.
    """
    found: dict[str, Any] = {}
    split: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        weight, _, part = name.rpartition(".")
        if weight.endswith(".weight") and part in (SHAPE, VALUES, MASK, INDEX):
            split.setdefault(weight, {})[part] = tensor
        else:
            found[name] = tensor
    for name, parts in split.items():
        found[name] = PackedSlice(name, parts, _checked_shape(name, parts), name in turned)
    return found


def _checked_shape(name: str, parts: Mapping[str, Any]) -> tuple[int, int]:
    """(O, I) of a weight whose parts fit each other."""
    for part in (SHAPE, VALUES):
        if part not in parts:
            raise _damaged(name, f"'{name}.{part}' is missing")
    if (MASK in parts) == (INDEX in parts):
        raise _damaged(name, f"exactly one of '{name}.{MASK}' and '{name}.{INDEX}' must be there")
    kinds = {part: (tensor.get_dtype(), tensor.get_shape()) for part, tensor in parts.items()}
    if kinds[SHAPE] != ("I64", [2]):
        raise _damaged(name, f"'{name}.{SHAPE}' is not two int64")
    outputs, inputs = parts[SHAPE][...].tolist()
    places = MASK if MASK in parts else INDEX
    dtype, shape = kinds[VALUES]
    wanted = [outputs, _row_bytes(places, inputs, shape)]
    if dtype not in _FLOATS or kinds[places] != ("U8", wanted):
        raise _damaged(
            name,
            f"'{name}.{VALUES}' is {dtype} {shape} and '{name}.{places}' "
            f"{kinds[places][0]} {kinds[places][1]} of a weight [{outputs}, {inputs}]",
        )
    return outputs, inputs


def _row_bytes(places: str, inputs: int, values: list[int]) -> int | None:
    """Bytes of a row of mask or index; None where no values of that shape go with it."""
    if places == MASK:
        return -(-inputs // 8) if len(values) == 1 else None
    if len(values) != 3 or not values[1] or inputs % values[1]:
        return None
    m = inputs // values[1]
    return index_bytes(values[1], values[2], m) if index_bits(m) else None


def _damaged(name: str, reason: str) -> CompressError:
    return CompressError(
        f"the packed weight '{name}' is damaged: {reason}", "export or copy the directory again"
    )
