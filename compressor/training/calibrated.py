"""Calibration block by block: what the Linears of a block read, from blocks that were changed.

A block is yielded with the second moments of its Linears' inputs over the real tokens of the
calibration sequences (model/moments.py); the activations are those that the blocks before it give
*after* the caller changed them. Then the block runs once more for those after it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.blockwise import Step, walk
from compressor.model.model import Model
from compressor.model.moments import Moments, mask_keys
from compressor.model.spill import Spill
from compressor.numerics.solver import DAMPING, Factor
from compressor.options import options
from compressor.training.batches import Batches
from compressor.training.reading import most_tokens
from compressor.training.workbench import Batch, Workbench

_LENGTH = 512
_ROWS, _TOKENS = 8, 1024  # that go through the model together; more take memory and save no time


@options
class SequenceOptions:
    """Which sequences decide."""

    samples: int = Field(128, ge=1, description="calibration sequences")
    length: int | None = Field(
        None, ge=2, description="tokens of a sequence; null: 512, or as many as the model takes"
    )

    @property
    def reads_data(self) -> bool:
        """Whether calibration sequences are read."""
        return True

    def tokens(self, config: Any) -> int:
        """Tokens of a sequence for a model of this config.

        Raises:
            CompressError: more are asked for than it takes.
        """
        most = most_tokens(config)
        if self.length is None:
            return _LENGTH if most is None else min(_LENGTH, most)
        if most is not None and self.length > most:
            raise CompressError(
                f"length is {self.length} and the model takes at most {most} tokens",
                f"set length to {most} or less",
            )
        return self.length


@options
class CalibrationOptions(SequenceOptions):
    """Which data decides, block by block."""

    offload: bool = Field(
        False,
        description="keep one block in memory: weights stay in files, activations are spilled to "
        "disk; for a model that is larger than memory",
    )

    @property
    def solves(self) -> bool:
        """Whether whole matrices of second moments are made, and what stays is changed."""
        return True


def rows_at_once(length: int) -> int:
    """Rows of a calibration batch."""
    return min(_ROWS, max(1, _TOKENS // length))


def calibration(samples: int, length: int, work: Workbench) -> Sequence[Batch]:
    """At most `samples` sequences of at most `length` tokens; the last batch may be smaller.

    Raises:
        CompressError: the calibration split is empty.
    """
    batch = min(rows_at_once(length), samples)
    whole = -(-samples // batch)
    batches = work.batches("calibration", whole, batch=batch, length=length)
    last = samples - (whole - 1) * batch
    return Batches(
        len(batches),
        lambda i: batches[i] if i < whole - 1 else {k: x[:last] for k, x in batches[i].items()},
    )


@dataclass(frozen=True)
class Watched:
    """A block, and what its Linears read."""

    step: Step
    linears: dict[str, nn.Linear]
    moments: Moments

    def inputs(self) -> Iterator[tuple[list[str], Tensor]]:
        """(names of Linears that read one input, its second moments [I, I] or [I]), once each.

        Raises:
            CompressError: an input has NaN or infinite values.
        """
        for leader, names in self.moments.shared.items():
            h = self.moments.pop(leader)
            if not bool(h.isfinite().all()):
                raise CompressError(
                    f"the inputs of '{leader}' have NaN or infinite values on the calibration data",
                    "start from a sound checkpoint, or look for rows that upset it",
                )
            yield names, h


@torch.no_grad()
def watched_blocks(
    model: Model,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    work: Workbench,
    label: str,
    whole: bool,
    spill: Spill | None = None,
    ranges: bool = False,
) -> Iterator[Watched]:
    """Yield every block once, in order; change its weights in place before asking for the next.

    Args:
        linears: whose inputs are watched, {module name: Linear}.
        batches: calibration sequences.
        label: of the progress bar, which counts blocks.
        whole: whether second moments are matrices [I, I], or their diagonals [I] alone.
        spill: where activations are kept; in memory without one.
        ranges: whether extremes and mean sizes of inputs are found too.
    """
    keys = mask_keys(model)
    masks = [{k: x for k, x in batch.items() if k in keys.values()} for batch in batches]
    blocks = sum(len(model.blocks(stack)) for stack in model.family.stacks)
    with work.progress(label, blocks) as advance:
        for step in walk(model, batches, spill):
            inside = set(step.block.modules())
            own = {name: m for name, m in linears.items() if m in inside}
            moments = Moments(own, keys, whole, ranges)
            for i, mask in enumerate(masks):
                with moments.watching(mask):
                    step.run(i)
            yield Watched(step, own, moments)
            advance(1)


def note_damping(model: Model, names: list[str], factor: Factor, work: Workbench) -> None:
    """Say, log and note which layers' Hessian took more damping than usual."""
    if factor.damping > DAMPING:
        said = f"damping {factor.damping:g} of the mean diagonal, not {DAMPING:g}"
        work.warn(f"{', '.join(names)}: {said}")
        model.notes.setdefault("damping", {}).update(dict.fromkeys(names, factor.damping))
