"""Batches of a split. Batch i is a pure function of (seed, i), whatever was asked for before."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compressor.training.workbench import Batch

Members = NDArray[np.int64]
_POOL = 64  # batches of rows sorted by length together: little padding, still well shuffled


class Readable(Protocol):
    """Rows of any kind: text, pairs, images, clips."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def read(self, members: Members) -> Batch: ...


class Batches(Sequence[Batch]):
    """`n` batches; `members(i)` are the rows of batch i."""

    def __init__(self, rows: Readable, n: int, members: Callable[[int], Members]) -> None:
        self.rows, self.n, self.members = rows, n, members

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.n))]
        if not -self.n <= index < self.n:
            raise IndexError(index)
        return self.rows.read(self.members(index % self.n))


def in_order(rows: Readable, n: int | None, batch: int) -> Batches:
    """Every row once, in the order of the split; the last batch may be smaller."""
    whole = -(-len(rows) // batch)

    def members(index: int) -> Members:
        return np.arange(index * batch, min((index + 1) * batch, len(rows)))

    return Batches(rows, whole if n is None else min(n, whole), members)


def shuffled(rows: Readable, n: int | None, batch: int, seed: int) -> Batches:
    """Endless epochs, each shuffled anew, rows of similar length together; None is one epoch.

    An epoch leaves out the rows that do not fill a batch; the next one leaves out others.
    """
    per_epoch = len(rows) // batch
    assert per_epoch > 0, "too few rows for one batch"
    lengths = rows.lengths

    @lru_cache(maxsize=1)
    def plan(epoch: int) -> NDArray[np.int64]:
        draw = np.random.default_rng([seed, epoch])
        order = draw.permutation(len(rows))[: per_epoch * batch]
        for start in range(0, len(order), _POOL * batch):
            pool = order[start : start + _POOL * batch]
            pool[:] = pool[np.argsort(lengths[pool], kind="stable")]
        return draw.permutation(order.reshape(per_epoch, batch))

    return Batches(
        rows, per_epoch if n is None else n, lambda i: plan(i // per_epoch)[i % per_epoch]
    )
