"""Batches of a split. Batch i is a pure function of (seed, i), whatever was asked for before."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    """`n` batches, made when asked for; `make(i)` is batch i, 0 <= i < n."""

    def __init__(self, n: int, make: Callable[[int], Batch]) -> None:
        self.n, self.make = n, make

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.n))]
        if not -self.n <= index < self.n:
            raise IndexError(index)
        return self.make(index % self.n)


def mapped(batches: Sequence[Batch], change: Callable[[Batch], Batch]) -> Batches:
    """The same batches, each changed when it is asked for."""
    return Batches(len(batches), lambda i: change(batches[i]))


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where the model is."""
    return {key: value.to(device) for key, value in batch.items()}


def row_inputs(batch: Batch) -> Tensor:
    """What the rows of a batch are made of: ids of tokens, sound, or pixels."""
    return next(batch[k] for k in ("input_ids", "input_features", "pixel_values") if k in batch)


def in_order(rows: Readable, n: int | None, batch: int) -> Batches:
    """Every row once, in the order of the split; the last batch may be smaller."""
    whole = -(-len(rows) // batch)

    def members(index: int) -> Members:
        return np.arange(index * batch, min((index + 1) * batch, len(rows)))

    return Batches(whole if n is None else min(n, whole), lambda i: rows.read(members(i)))


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

    def members(index: int) -> Members:
        return plan(index // per_epoch)[index % per_epoch]

    return Batches(per_epoch if n is None else n, lambda i: rows.read(members(i)))
