"""A model that is used with projected weights and trained in full precision.

For the time of one loss every projected weight is replaced by a leaf tensor w' = project(w), once,
in all modules that share it; when the gradient of w' is complete it is carried on to w, and to
what the projection itself learns. So a pass draws once where rounding is stochastic, projects once
however often a weight is used, ties and heads that are applied in chunks included, and outside of
it the modules hold the weights that train. This is the loop of arXiv 1802.05668: quantize, find
the gradient there, restore, step.

It works for any module with a `weight`.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from compressor.numerics.projection import Projection
from compressor.training.loop import Itemized

Layer = tuple[Sequence[nn.Module], Projection]


class Projected(nn.Module):
    """A loss of a model whose weights are projected.

    Args:
        loss: batch -> scalar.
        layers: modules that share one weight, and its projection.

    Attributes:
        parts: what the last loss was made of.
    """

    def __init__(self, loss: nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.loss = loss
        self.projections = nn.ModuleList(projection for _, projection in layers)
        self.layers = [(tuple(users), projection) for users, projection in layers]  # not ours
        self.parts: dict[str, Tensor] = {}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        with projected(self.layers):
            value = self.loss(batch)
        self.parts = dict(self.loss.parts) if isinstance(self.loss, Itemized) else {}
        return value


@contextmanager
def projected(layers: Sequence[Layer]) -> Iterator[None]:
    """Inside, modules use their weights projected; gradients reach the weights they had before."""
    with ExitStack() as after:
        for users, projection in layers:
            weight = users[0].weight
            assert isinstance(weight, nn.Parameter)
            value = projection(weight)
            leaf = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
            if value.requires_grad:
                leaf.register_post_accumulate_grad_hook(partial(_carry_on, value))
            for user in users:
                after.callback(setattr, user, "weight", weight)
                user.weight = leaf
        yield


def _carry_on(value: Tensor, leaf: Tensor) -> None:
    gradient, leaf.grad = leaf.grad, None
    value.backward(gradient)
