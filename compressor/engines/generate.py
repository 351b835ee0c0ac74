"""Greedy text through any engine with a key-value cache."""

from collections.abc import Iterator, Mapping, Sequence

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
    found = list(prompt)
    for token in greedy_tokens(engine, {**(source or {}), **given}, tokens):
        found.append(int(token))
        if found[-1] == stop:
            break
    return found


def greedy_tokens(
    engine: Engine,
    batch: dict[str, Tensor],
    tokens: int,
    never: Sequence[int] = (),
    never_first: Sequence[int] = (),
) -> Iterator[Tensor]:
    """The most likely next token of every row, step by step, as long as somebody asks for more.

    Args:
        engine: as for `generate`.
        batch: a prompt for `prefill`: rows padded on the left, or all of one length.
        tokens: steps at most.
        never: token ids that are not taken.
        never_first: token ids that the first step does not take.

    Yields:
        int64 [B]. Rows that have ended are for the caller to cut.
    """
    logits, cache = engine.prefill(batch)
    avoided = [*never, *never_first]
    for step in range(tokens):
        last_BV = logits[:, -1].clone()
        last_BV[:, avoided] = -torch.inf
        token_B = last_BV.argmax(dim=-1)
        yield token_B
        if step + 1 < tokens:
            logits, cache = engine.decode(token_B[:, None], cache)
        avoided = list(never)


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
