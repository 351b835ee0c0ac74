"""The loss of an objective on rows that nothing trains on: what recovery bought.

A bounded number of batches, taken evenly from the whole validation split, so that the price does
not grow with the data. In float32 and without gradients, whatever precision the training takes,
so the same weights give the same number. Nothing is left behind that a resumed run could notice.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compressor.training.batches import Batches, on_device, row_inputs
from compressor.training.loop import Itemized
from compressor.training.options import Train
from compressor.training.parallel import alone
from compressor.training.snapshot import without_trace
from compressor.training.workbench import Batch, Workbench

MOST = 32  # batches


def validation_batches(options: Train, work: Workbench) -> Batches:
    """At most MOST batches of the validation split, evenly spaced; none where it has no row."""
    shape = {"batch": options.batch, "length": options.length}
    every = work.batches("validation", None, least=0, **shape)
    count = min(len(every), MOST)
    return Batches(count, lambda i: every[i * len(every) // count])


@dataclass(frozen=True)
class Found:
    """What an objective says of rows, in nats or whatever it counts in.

    Attributes:
        loss: mean over the batches, which count by their rows.
        parts: the same of its parts, of an objective that has some.
        rows: how many there were.
    """

    loss: float
    parts: dict[str, float]
    rows: int


@torch.no_grad()
def validation_loss(objective: nn.Module, batches: Sequence[Batch], work: Workbench) -> Found:
    """The loss of batches. One process computes it: the last batch of a split seldom divides."""
    objective.to(work.device)
    total, rows, sums = 0.0, 0, defaultdict[str, float](float)
    with (
        alone(),
        without_trace(objective),
        work.progress("validation", len(batches)) as advance,
    ):
        for batch in batches:
            size = len(row_inputs(batch))
            total += objective(on_device(batch, work.device)).item() * size
            rows += size
            for name, part in objective.parts.items() if isinstance(objective, Itemized) else ():
                sums[name] += float(part) * size
            advance(1)
    return Found(total / rows, {name: value / rows for name, value in sums.items()}, rows)
