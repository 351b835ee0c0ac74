"""Hidden states of every stack: of the one there is, or of encoder and decoder.

State 0 is the output of the embeddings, state i that of block i; the last one lies behind the
final norm. Legend: B rows, S tokens, H width.
"""

from typing import Any

import torch
from torch import Tensor

from compressor.errors import CompressError
from compressor.model.model import Model

States = list[tuple[Tensor, ...]]  # of every stack, [B, S, H] each


def states_of(output: Any) -> States:
    """The hidden states in an output of transformers that was asked for them.

    Some classes (ViT) leave the one behind the final norm out of the list.
    """
    if "decoder_hidden_states" in output:
        return [output.encoder_hidden_states, output.decoder_hidden_states]
    if "last_hidden_state" in output:
        return [(*output.hidden_states[:-1], output.last_hidden_state)]
    return [output.hidden_states]


def depths(model: Model) -> list[int]:
    """Layers of every stack."""
    return [len(model.blocks(stack)) for stack in model.family.stacks]


def real_positions(model: Model, batch: dict[str, Tensor], states: States) -> list[Tensor]:
    """Masks [B, S] of every stack; without a mask in the batch all positions are real."""
    return [
        batch[stack.mask].bool()
        if stack.mask in batch
        else torch.ones(own[0].shape[:2], dtype=torch.bool, device=own[0].device)
        for stack, own in zip(model.family.stacks, states, strict=True)
    ]


def refuse_other_patches(student: Model, teacher: Model) -> None:
    """Raise CompressError when images fall into other patches, so that states do not pair up."""
    patches = [getattr(model.config, "patch_size", None) for model in (student, teacher)]
    if patches[0] != patches[1]:
        raise CompressError(
            f"the teacher has patches of {patches[1]} pixels and the student of {patches[0]}",
            "use distill.kd, or a teacher with the same patch_size",
        )
