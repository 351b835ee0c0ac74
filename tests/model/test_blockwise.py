"""The walk gives the full forward bit for bit, and changes to a block reach the blocks after it."""

import pytest
import torch
from torch import nn

from compressor.model.blockwise import record, walk
from compressor.model.forward import accepted
from families import CONFIGS, pico, random_inputs


@pytest.mark.parametrize("name", CONFIGS)
def test_replay_equals_the_full_forward_bit_for_bit(name):
    model = pico(name)
    batches = [random_inputs(model, rows, length, rows) for rows, length in ((3, 11), (1, 5))]
    wanted = {}  # inputs of every block in an ordinary forward
    for stack in model.family.stacks:
        wanted[stack.blocks] = [
            stream for batch in batches for stream in _inputs_of_blocks(model, stack, batch)
        ]
    steps = 0
    for step in walk(model, batches):
        blocks = len(model.blocks(step.stack))
        for i, stream in enumerate(step.inputs):
            assert torch.equal(stream, wanted[step.stack.blocks][i * blocks + step.index])
        steps += 1
    assert steps == sum(len(model.blocks(stack)) for stack in model.family.stacks)


@torch.no_grad()
def _inputs_of_blocks(model, stack, batch):
    seen = []

    def keep(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [b.register_forward_pre_hook(keep, with_kwargs=True) for b in model.blocks(stack)]
    model.module(**accepted(model, batch))  # with a cache, as anybody would call it
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["llama", "t5", "whisper"])
def test_a_changed_block_is_seen_by_all_that_follow(name):
    model = pico(name)
    batches = [random_inputs(model)]
    for step in walk(model, batches):
        if step.index == 0:
            for part in step.block.modules():
                if isinstance(part, nn.Linear):
                    part.weight.data.mul_(0.5)
        last = step.stack, step.run(0)
    stack = model.family.stacks[-1]
    assert last[0] is stack
    streams, arguments = record(model, stack, batches)  # of the changed model
    stream = streams[0]
    for block, given in zip(model.blocks(stack), arguments[0], strict=True):
        with torch.no_grad():
            out = block(stream, *given.args, **given.kwargs)
        stream = out[0] if isinstance(out, tuple) else out
    assert torch.equal(last[1], stream)


def test_a_linear_that_sees_no_token_is_an_error():
    model = pico("llama")
    model.module.model.layers[0].extra = nn.Linear(4, 4)
    with pytest.raises(AssertionError, match=r"layers\.0 saw no token"):
        list(walk(model, [random_inputs(model)]))
