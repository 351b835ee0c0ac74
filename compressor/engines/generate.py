"""Greedy text through any engine with a key-value cache."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compressor.engines import Engine
from compressor.model.sources import read_config


def generate(
    engine: Engine,
    prompt: Sequence[int],
    tokens: int,
    stop: int | None = None,
    source: Mapping[str, Tensor] | None = None,
) -> list[int]:
    """Continue a prompt by taking the most likely token each time.

    Args:
        engine: an engine of a causal language model or an encoder-decoder.
        prompt: token ids, at least one; of an encoder-decoder those its answer begins with, where
            none are given its decoder_start_token_id.
        tokens: how many tokens to add at most.
        stop: token id that ends the text.
        source: what an encoder-decoder reads: input_ids and attention_mask, or input_features,
            of one row.

    Returns:
        The ids of prompt and continuation.
    """
    prefix = "" if source is None else "decoder_"
    if source is not None and not prompt:
        prompt = [read_config(engine.path)["decoder_start_token_id"]]
    ids = torch.tensor([list(prompt)])
    given = {f"{prefix}input_ids": ids, f"{prefix}attention_mask": torch.ones_like(ids)}
    logits, cache = engine.prefill({**(source or {}), **given})
    found = list(prompt)
    for _ in range(tokens):
        found.append(int(logits[0, -1].argmax()))
        if found[-1] == stop or len(found) == len(prompt) + tokens:
            break
        logits, cache = engine.decode(torch.tensor([[found[-1]]]), cache)
    return found


def follow(
    engine: Engine, prompt: dict[str, Tensor], count: int, text: Tensor | None = None
) -> Tensor:
    """Logits of the next `count` tokens behind a prompt, one step at a time on the cache.

    Args:
        engine: as for `generate`.
        prompt: a batch of unpadded prompts, as for `Engine.prefill`.
        text: token ids [B, count] that are taken as said, whatever is likely; None takes the most
            likely one each time.

    Returns:
        [B, count, V]; where text is None, the greedy tokens are their argmax.
    """
    logits, cache = engine.prefill(prompt)
    found = [logits[:, -1:]]
    for i in range(count - 1):
        token = found[-1].argmax(dim=-1) if text is None else text[:, i : i + 1]
        logits, cache = engine.decode(token, cache)
        found.append(logits)
    return torch.cat(found, dim=1)
