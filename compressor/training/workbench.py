"""What a method may ask of its surroundings. Its public names are frozen by a test."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.model.model import Model
from compressor.screen import Screen

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Workbench:
    """Data, teacher, reference, seed, device, progress, log and scratch of one stage.

    Private fields are closures set by the pipeline, so nothing is loaded before it is asked for.
    """

    seed: int
    device: torch.device
    scratch: Path  # private to this stage, kept until the stage directory is complete
    _screen: Screen
    _log: Callable[[str], None]
    _batches: Callable[..., Sequence[Batch]]
    _teacher: Callable[[], Model]
    _reference: Callable[[], Any]

    def batches(self, split: str, n: int | None, **shape: Any) -> Sequence[Batch]:
        """`n` batches of a split (train, calibration, validation, heldout); see data.Batches.

        train is shuffled and endless; the others run in order, once, with at most `n` batches
        (None: all). `shape` is batch=8 and length=128 unless given.
        """
        return self._batches(split, n, **shape)

    @cached_property
    def teacher(self) -> Model:
        """The teacher, loaded when first asked for, in eval mode without gradients."""
        return self._teacher()

    @cached_property
    def reference(self) -> Any:
        """The engine others are compared with: the first candidate, or the input of a run."""
        return self._reference()

    def progress(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar: `with work.progress("train", steps) as advance: advance(1)`."""
        return self._screen.progress(label, total)

    def log(self, text: str) -> None:
        """One line into log.txt."""
        self._log(text)

    def warn(self, text: str) -> None:
        """One line into log.txt and on the screen."""
        self._screen.say(f"  {text}")
        self._log(text)
