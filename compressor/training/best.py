"""The best weights of a training: it looks at validation rows as it goes, and may end early.

They lie beside the snapshots, best-<step>.safetensors: the best of now, and the best that the last
snapshot knows of, from which a killed run goes on.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.training.options import Train
from compressor.training.snapshot import flush

_PREFIX, _PARTIAL = "best-", "best.partial"


class Progress(Protocol):
    """What a run knows of its best weights; it belongs to the snapshot."""

    step: int
    best: float | None  # validation loss
    best_step: int


def looks_after(step: int, options: Train) -> bool:
    """Whether a step ends with a look at validation rows."""
    every = options.validate_every
    return every > 0 and (step % every == 0 or step == options.steps)


def is_over(done: Progress, options: Train) -> bool:
    """Whether all steps are done, or no look of the last `patience` was the best."""
    waited = done.step - done.best_step
    return done.step >= options.steps or 0 < options.patience * options.validate_every <= waited


def is_better(loss: float, done: Progress) -> bool:
    """Whether a look is the best until now; NaN never is."""
    return math.isfinite(loss) and (done.best is None or loss < done.best)


def keep(folder: Path, step: int, state: Mapping[str, Tensor], known: int) -> None:
    """Write the weights of `step`; all others go but those of `known`, the last snapshot's best."""
    partial = folder / _PARTIAL
    try:
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, partial)
        flush(partial)
        partial.rename(_file(folder, step))
    finally:
        partial.unlink(missing_ok=True)  # a full disk gets its space back
    flush(folder)
    forget(folder, but=(step, known))


@torch.no_grad()
def restore(folder: Path, step: int, state: Mapping[str, Tensor]) -> None:
    """Put the weights of a step back."""
    found = load_file(_file(folder, step))
    for name, value in state.items():
        value.copy_(found[name])


def forget(folder: Path, but: Collection[int] = ()) -> None:
    """Delete the weights of other steps."""
    kept = {_file(folder, step) for step in but}
    for file in folder.glob(f"{_PREFIX}*"):
        if file not in kept:
            file.unlink()


def _file(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step:09d}.safetensors"
