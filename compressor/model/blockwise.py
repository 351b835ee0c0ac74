"""Walk through a model block by block, with what each block would really be called with.

The inputs of a stack's first block, and all other arguments of every block, are recorded in one
forward pass, in which blocks that hand on nothing but the stream are passed over. Blocks are then
replayed: a block reads what the block before it gives *now*, after whatever the caller did to it,
and the recorded masks, positions and biases. So nothing here knows about masks, rotary tables,
relative position bias or cross attention. The stacks of an encoder-decoder go one after the other,
and the second is recorded when the first is finished. What a block hands to later ones beside the
stream is replayed as recorded: T5's position bias, so whoever changes that table sees it in the
next forward pass only.

Legend: B rows, S tokens, H width of the residual stream.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.model.families import Stack
from compressor.model.forward import run_backbone
from compressor.model.model import Model
from compressor.model.spill import Spill

_STREAM = "hidden_states"
_LARGE = 2**16  # bytes of an argument that is worth a file


@dataclass(frozen=True)
class Arguments:
    """What one block was called with in one batch, the residual stream aside."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One block of the walk; change `block` in place and the blocks after it see the change.

    Attributes:
        stack: the stack it belongs to.
        index: its number in the stack, from 0.
        block: the module.
        inputs: for each batch, the residual stream [B, S, H] that it reads.
        arguments: for each batch, the rest of the call.
    """

    stack: Stack
    index: int
    block: nn.Module
    inputs: list[Tensor]
    arguments: list[Arguments]

    @torch.no_grad()
    def run(self, batch: int) -> Tensor:
        """Output of the block for one batch, as it is now: [B, S, H]."""
        given = self.arguments[batch]
        return stream_of(self.block(self.inputs[batch], *given.args, **given.kwargs))


def walk(
    model: Model, batches: Sequence[dict[str, Tensor]], spill: Spill | None = None
) -> Iterator[Step]:
    """Yield every block once, in order.

    The walk holds one residual stream [B, S, H] for each batch. A block runs once more after it
    was yielded, which is when the caller's changes take effect; the last of a stack does not, as
    nothing here reads what it gives.

    Args:
        batches: what the model reads.
        spill: where streams and large arguments are kept; in memory without one.
    """
    for stack in model.family.stacks:
        streams, arguments = record(model, stack, batches, spill)
        blocks = model.blocks(stack)
        for index, block in enumerate(blocks):
            step = Step(stack, index, block, streams, [given[index] for given in arguments])
            yield step
            if index + 1 == len(blocks):
                break
            for i in range(len(batches)):  # in place: one stream per batch is alive
                found = _checked(step, i)
                if spill is None:
                    streams[i] = found
                else:
                    spill.rewrite(streams[i], found)


def _checked(step: Step, batch: int) -> Tensor:
    """Run a block and make sure that every Linear in it saw tokens."""
    seen: set[nn.Module] = set()
    linears = [m for m in step.block.modules() if isinstance(m, nn.Linear)]
    with ExitStack() as hooks:
        for linear in linears:
            hooks.enter_context(linear.register_forward_hook(lambda m, i, o: seen.add(m)))
        found = step.run(batch)
    # a cached key would let cross attention skip its Linears, and a solver would see no data
    assert len(seen) == len(linears), f"a Linear of {step.stack.blocks}.{step.index} saw no token"
    return found


@torch.no_grad()
def record(
    model: Model,
    stack: Stack,
    batches: Sequence[dict[str, Tensor]],
    spill: Spill | None = None,
) -> tuple[list[Tensor], list[list[Arguments]]]:
    """For each batch, the input [B, S, H] of the first block, and the arguments of all blocks."""
    streams: list[Tensor] = []
    arguments: list[list[Arguments]] = []
    blocks = model.blocks(stack)
    large: dict[int, tuple[Tensor, Tensor]] = {}  # of one batch: what blocks share is stored once

    def put(value: Any) -> Any:
        if spill is None or not isinstance(value, Tensor) or value.nbytes < _LARGE:
            return value
        if id(value) not in large:
            large[id(value)] = value, spill.store(value)
        return large[id(value)][1]

    def hook(index: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream, given = _split(args, kwargs)
            if index == 0:
                streams.append(stream if spill is None else spill.store(stream))
                arguments.append([])
            kept = {key: put(value) for key, value in given.kwargs.items()}
            arguments[-1].append(Arguments(tuple(put(value) for value in given.args), kept))

        return keep

    hands_on: list[Any] = []  # outputs that are more than the stream

    def look(_: nn.Module, __: Any, output: Any) -> None:
        hands_on.extend([] if isinstance(output, Tensor) else [output])

    with ExitStack() as hooks:
        hooks.enter_context(blocks[0].register_forward_hook(look))
        for index, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_pre_hook(hook(index), with_kwargs=True))
        run_backbone(model, batches[0])
        large.clear()
        if not hands_on:
            hooks.enter_context(_passed_over(blocks))
        for batch in batches[1:]:
            run_backbone(model, batch)
            large.clear()
    assert all(len(given) == len(blocks) for given in arguments)
    return streams, arguments


@contextmanager
def _passed_over(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While open, these blocks are called and do nothing: their stream goes on as it came."""
    changed: list[Any] = list(blocks)
    for block in changed:
        block.forward = lambda *args, **kwargs: _split(args, kwargs)[0]
    try:
        yield
    finally:
        for block in changed:
            del block.forward  # the class's own shows again


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """The residual stream, which comes first or by name, and the rest."""
    stream, args = (args[0], args[1:]) if args else (kwargs[_STREAM], ())
    rest = {key: value for key, value in kwargs.items() if key != _STREAM}
    assert rest.get("past_key_values") is None, "a cache would be replayed"
    return stream, Arguments(args, rest)


def stream_of(output: Any) -> Tensor:
    """The residual stream of a block's output: a tensor, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output
