"""Importance of layers by removal: what a model loses while some of its layers are skipped.

Sources: arXiv 2407.14679, section 2.2 (perplexity without one layer), and arXiv 2408.11796 (a
task's score without n consecutive layers). With R a set of layers,

    score_R = sum_b damage_b(model without R) / sum_b n_b

where `damage` says what is lost on a batch b of n_b answers. The ready-made alternative, block
influence, needs no removal; see importance.py.

A skipped block runs and its output is thrown away in favour of its input. That costs one block's
time and nothing else: no weight is copied, and what a block returns beside the stream (T5's
position bias, which later blocks read) is still there.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.model.families import Stack
from compressor.model.importance import stream_into
from compressor.model.model import Model

Batch = dict[str, Tensor]
Removal = tuple[Stack, Sequence[int]]
Lost = Callable[[], tuple[float, int]]  # runs the model as it is now: (sum, answers)
Damage = Callable[[Model, Batch], Lost]  # is given the whole model first


@contextmanager
def skipping(model: Model, removal: Removal) -> Iterator[None]:
    """The layers of a removal pass their input on, until the block ends."""
    stack, layers = removal
    blocks = model.blocks(stack)
    with ExitStack() as hooks:
        for i in layers:
            hooks.enter_context(blocks[i].register_forward_hook(_bypass, with_kwargs=True))
        yield


def _bypass(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    before = stream_into(args, kwargs)
    return (before, *output[1:]) if isinstance(output, tuple) else before


def single_layers(depth: int) -> list[range]:
    """Every layer by itself."""
    return consecutive(depth, 1)


def consecutive(depth: int, n: int) -> list[range]:
    """Every window of n consecutive layers, by its first."""
    return [range(first, first + n) for first in range(depth - n + 1)]


@torch.no_grad()
def removal_scores(
    model: Model,
    removals: Sequence[Removal],
    batches: Iterable[Batch],
    damage: Damage,
    advance: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """Score removals, each by itself; higher is more important.

    Args:
        removals: what is skipped: a stack and layers of it.
        damage: how much is lost; see prune/damage.py.
        advance: `advance(1)` is called after every removal of every batch.

    Returns:
        [removals], float32.
    """
    totals, answers = [0.0] * len(removals), 0
    for batch in batches:
        lost, count = damage(model, batch), 0
        for i, removal in enumerate(removals):
            with skipping(model, removal):
                found, count = lost()
            totals[i] += found
            advance(1)
        answers += count
    return torch.tensor(totals) / answers
