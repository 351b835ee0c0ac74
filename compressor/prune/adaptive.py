"""The objective of sparse training whose masks are chosen again while it runs.

Its buffers, masks included, are part of a snapshot, so a run that is killed goes on with the same
masks and counts. `after_step` is for training/loop.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compressor.training.best import looks_after
from compressor.training.loop import Itemized
from compressor.training.options import Train
from compressor.training.straight_through import Masked


class Adaptive(nn.Module):
    """A loss of a model with masked weights.

    Args:
        loss: batch -> scalar.
        layers: (mask, dense weight) of every layer that is pruned.
        every: steps between two choices of the masks; None leaves them as they are.
        train: whose looks at validation rows and last step choose them as well, so that no model
            that may be kept has masks of other weights.

    Attributes:
        flip_rate: share of the entries of all masks that the last choice changed.
        picks: choices so far.
        parts: what the last loss was made of, and the flip rate once there is one.
    """

    flip_rate: Tensor
    picks: Tensor

    def __init__(
        self,
        loss: nn.Module,
        layers: Sequence[tuple[Masked, nn.Parameter]],
        every: int | None,
        train: Train,
    ) -> None:
        super().__init__()
        self.loss, self.every, self.options = loss, every, train
        self.masks = nn.ModuleList(mask for mask, _ in layers)
        self.layers = layers  # a tuple each, so the weights are not ours
        self.register_buffer("flip_rate", torch.zeros(()))
        self.register_buffer("picks", torch.zeros((), dtype=torch.int64))
        self.parts: dict[str, Tensor] = {}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        value = self.loss(batch)
        self.parts = dict(self.loss.parts) if isinstance(self.loss, Itemized) else {}
        if torch.is_grad_enabled() and int(self.picks):  # not where a loss is only measured
            self.parts["flip_rate"] = self.flip_rate
        return value

    def after_step(self, step: int) -> None:
        """Choose the masks again where it is time."""
        if self.every is None:
            return
        kept = step == self.options.steps or looks_after(step, self.options)
        if kept or step % self.every == 0:
            self.pick()
            self.parts["flip_rate"] = self.flip_rate

    def pick(self) -> None:
        """Choose all masks again from the dense weights as they are now."""
        changed = torch.stack([mask.pick(weight) for mask, weight in self.layers]).sum()
        self.flip_rate.copy_(changed / sum(weight.numel() for _, weight in self.layers))
        self.picks += 1
