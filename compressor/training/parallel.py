"""Several processes on one profile, started by torchrun: who leads, who waits, what they share.

Process 0 leads. It alone locks, writes, measures and speaks; the others take their share of the
rows of every training batch and wait for the rest. Gradients are averaged through `accelerate`
over gloo. Words go through torchrun's key-value store, which has no time limit: an export may
take an hour. A process that fails leaves word there, so that nobody waits for it.
"""

import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from compressor.errors import CompressError
from compressor.training.batches import mapped
from compressor.training.workbench import Batch

_WORD, _FAILURE = "compress/word", "compress/failure"  # keys of the store
_PATIENCE = 2.0  # seconds until a process that fails has said so
_POLL = 0.05
_NUMBERS = itertools.count()  # of words; a second run of this process does not hear the first's


@dataclass
class Team:
    """The processes of one run; one process without torchrun.

    Attributes:
        rank: number of this process; 0 leads.
        size: number of processes. Every method is called by all of them in the same order.
    """

    rank: int = 0
    size: int = 1
    _store: Any = None
    _accelerator: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def tell(self, word: str = "go") -> None:
        """The leader's word to all who `hear`; nothing when there is nobody."""
        assert self.leads
        if self.size > 1:
            self._store.set(f"{_WORD}/{next(_NUMBERS)}", word)

    def hear(self) -> str:
        """Wait for the leader's next word.

        Raises:
            CompressError: a process failed.
        """
        name = f"{_WORD}/{next(_NUMBERS)}"
        while not self._store.check([name]):
            failed = self._failure()
            if failed is not None:
                raise failed
            time.sleep(_POLL)
        return self._store.get(name).decode()

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader passes the block alone; the others follow and find on disk what it left."""
        if not self.leads:
            self.hear()
        yield
        if self.leads:
            self.tell()

    def meet(self) -> None:
        """Go on when all are here."""
        if self.size > 1:
            self._accelerator.wait_for_everyone()

    def share(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """This process's rows of every batch."""
        if self.size == 1:
            return batches
        return mapped(batches, partial(_share, rank=self.rank, size=self.size))

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their means over the processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                tensor.copy_(self._accelerator.reduce(tensor, "mean"))

    def from_leader(self, value: float) -> float:
        """The leader's number, in every process."""
        number = torch.tensor([value * self.size if self.leads else 0.0], dtype=torch.float64)
        self.average([number])
        return float(number)

    def explain(self, error: Exception) -> Exception:
        """What to raise for an error: another process's failure, if that is what caused it."""
        begin, lost = time.monotonic(), _lost_connection(error)
        failed = self._failure()
        while failed is None and lost and time.monotonic() - begin < _PATIENCE:
            time.sleep(_POLL)
            failed = self._failure()
        if failed is None and lost:
            failed = CompressError(
                "another process of this run ended without a word (killed, or out of memory?)",
                "the same command continues",
            )
        if failed is None:
            known = isinstance(error, CompressError)
            what, hint = (error.what, error.hint) if known else (f"{error!r}", "")
            code = error.exit_code if known else 1
            word = {"rank": self.rank, "what": what, "hint": hint, "code": code}
            self._store.set(_FAILURE, json.dumps(word))
        return failed or error

    def _failure(self) -> Exception | None:
        """The failure that a process left word of."""
        if not self._store.check([_FAILURE]):
            return None
        word = json.loads(self._store.get(_FAILURE))
        if word["code"] == 1:
            return RuntimeError(f"process {word['rank']}: {word['what']}")
        failed = CompressError(f"process {word['rank']}: {word['what']}", word["hint"])
        failed.exit_code = word["code"]
        return failed


def _share(batch: Batch, rank: int, size: int) -> Batch:
    """Rows rank * n to (rank + 1) * n of a batch with size * n rows."""
    rows, rest = divmod(len(next(iter(batch.values()))), size)
    assert rest == 0, "batches that do not divide are refused before the run"
    own = slice(rank * rows, (rank + 1) * rows)
    return {key: value[own] for key, value in batch.items()}


_current = Team()


def team() -> Team:
    """The team this process works in now."""
    return _current


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is a team of one: what it computes waits for nobody."""
    global _current
    before, _current = _current, Team()
    try:
        yield
    finally:
        _current = before


@contextmanager
def joined() -> Iterator[Team]:
    """Join the processes that torchrun started; without torchrun, a team of one.

    Raises:
        CompressError: in every process, when one of them fails.
    """
    global _current  # like torch.distributed itself, one per process
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield _current
        return
    _current, linger = _join(size), 0.0
    try:
        yield _current
    except Exception as error:
        explained = _current.explain(error)
        # torchrun ends all as soon as one has ended: process 0 shall say why before
        linger = 0.0 if _current.leads else _PATIENCE
        if explained is error:
            raise
        raise explained from error
    finally:
        _current = Team()
        distributed.destroy_process_group()
        time.sleep(linger)


def _join(size: int) -> Team:
    from accelerate import Accelerator

    store, rank, _ = next(rendezvous("env://"))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    accelerator = Accelerator(cpu=True)
    # a configuration that accelerate misreads gives that many trainings instead of one
    assert accelerator.num_processes == size, "accelerate does not see torchrun's processes"
    return Team(rank, size, store, accelerator)


def _lost_connection(error: Exception) -> bool:
    """Whether gloo says that a peer is gone."""
    said = str(error)
    return isinstance(error, RuntimeError) and ("gloo" in said or "onnection" in said)


def refuse_uneven(batch: int, size: int, place: str) -> None:
    """Refuse a global batch that the processes cannot share equally.

    Raises:
        CompressError: names the nearest batch that they can.
    """
    if batch % size:
        best = max(size, round(batch / size) * size)
        raise CompressError(
            f"{place}.train.batch is {batch}, which {size} processes cannot share equally",
            f"--set {place}.train.batch={best}",
        )
