"""The best weights of a training: it looks at validation rows as it goes, and may end early.

They lie in best.safetensors, beside the snapshots. A run that goes on from a snapshot older than
the file comes to the same step again and writes the same weights.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.training.options import Train
from compressor.training.snapshot import flush

NAME = "best.safetensors"


class Progress(Protocol):
    """What a run knows of its best weights; it belongs to the snapshot."""

    step: int
    best: float | None  # validation loss
    best_step: int


def looks_now(done: Progress, options: Train) -> bool:
    """Whether a step ends with a look at validation rows."""
    every = options.validate_every
    return every > 0 and (done.step % every == 0 or done.step == options.steps)


def is_over(done: Progress, options: Train) -> bool:
    """Whether all steps are done, or no look of the last `patience` was the best."""
    waited = done.step - done.best_step
    return done.step >= options.steps or 0 < options.patience * options.validate_every <= waited


def is_better(loss: float, done: Progress) -> bool:
    """Whether a look is the best until now; NaN never is."""
    return math.isfinite(loss) and (done.best is None or loss < done.best)


def keep(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Put the weights of now in the place of the best."""
    partial = folder / f"{NAME}.partial"
    try:
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, partial)
        flush(partial)
        partial.rename(folder / NAME)
    finally:
        partial.unlink(missing_ok=True)  # a full disk gets its space back
    flush(folder)


@torch.no_grad()
def restore(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Put the best weights back."""
    found = load_file(folder / NAME)
    for name, value in state.items():
        value.copy_(found[name])


def forget(folder: Path) -> None:
    """Delete the weights of another run."""
    (folder / NAME).unlink(missing_ok=True)
