"""The calibration sequences that a pruning method reads."""

from collections.abc import Sequence

from compressor.training.batches import Batches
from compressor.training.workbench import Batch, Workbench

BATCH = 8  # rows that go through the model together


def calibration(samples: int, length: int, work: Workbench) -> Sequence[Batch]:
    """At most `samples` sequences of at most `length` tokens; the last batch may be smaller.

    Raises:
        CompressError: the calibration split is empty.
    """
    batch = min(BATCH, samples)
    whole = -(-samples // batch)
    batches = work.batches("calibration", whole, batch=batch, length=length)
    last = samples - (whole - 1) * batch
    return Batches(
        len(batches),
        lambda i: batches[i] if i < whole - 1 else {k: x[:last] for k, x in batches[i].items()},
    )
