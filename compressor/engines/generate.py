"""Greedy text generation through any engine with a key-value cache."""

from collections.abc import Sequence

import torch

from compressor.engines import Engine


def generate(
    engine: Engine, prompt: Sequence[int], tokens: int, stop: int | None = None
) -> list[int]:
    """Continue a prompt by taking the most likely token each time.

    Args:
        engine: an engine of a causal language model.
        prompt: token ids, at least one.
        tokens: how many tokens to add at most.
        stop: token id that ends the text.

    Returns:
        The ids of prompt and continuation.
    """
    ids = torch.tensor([list(prompt)])
    logits, cache = engine.prefill({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    found = list(prompt)
    for _ in range(tokens):
        found.append(int(logits[0, -1].argmax()))
        if found[-1] == stop or len(found) == len(prompt) + tokens:
            break
        logits, cache = engine.decode(torch.tensor([[found[-1]]]), cache)
    return found
