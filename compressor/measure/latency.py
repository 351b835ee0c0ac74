"""Speed of one candidate: one call of `run` is one round, of a fixed time and not a fixed count.

    encoders, classifiers   latency: one forward of 1 row of `length` tokens
                            throughput: rows per second in forwards of `batch` rows
    causal language models  latency: one decode step after a prompt of `length` tokens, 1 row
                            throughput: tokens per second of these steps
                            prefill_ms: the prompt, i.e. the time to the first token

Rows are real text without padding (inputs.py). Times are wall time in milliseconds of the engine's
call alone, after two calls that do not count. p50, p95 and iqr (p75 - p25) are over the calls of
the round. Whoever compares candidates takes turns round by round and medians over rounds, as
run/bench.py does: a machine's speed drifts more between minutes than between candidates.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pydantic import Field

from compressor.engines import Engine
from compressor.measure.inputs import fitting_length, heldout, token_rows
from compressor.model.checkpoint import read_task
from compressor.options import options
from compressor.training.workbench import Batch, Workbench

_WARM_UP = 2
_BATCH = 8  # held-out rows read at once


@options
class Options:
    """The shapes and the time of a round."""

    length: int = Field(128, ge=2, description="tokens of a row, or of a decoder's prompt")
    batch: int = Field(32, ge=0, description="rows of a throughput forward; 0: no throughput")
    tokens: int = Field(32, ge=1, description="decode steps after a prompt")
    seconds: float = Field(0.3, gt=0, description="time of each part of a round, at least")


def run(engine: Engine, options: Options, work: Workbench) -> dict[str, float]:
    """Time one round.

    Returns:
        p50, p95, iqr (ms), length (tokens, as far as the model has positions), and throughput
        (rows or tokens per second) and, of a decoder, prefill_ms.

    Raises:
        CompressError: there is no held-out text.
    """
    decoder = read_task(engine.path) == "causal-lm"
    length = fitting_length(engine.path, options.length)
    if decoder:
        length = fitting_length(engine.path, length + options.tokens) - options.tokens
    rows = max(1, options.batch)
    text = token_rows(heldout(work, rows, _BATCH, length), rows, length)
    found = _decoder(engine, options, text) if decoder else _encoder(engine, options, text)
    return found | {"length": length}


def _encoder(engine: Engine, options: Options, text: Batch) -> dict[str, float]:
    first = {key: value[:1] for key, value in text.items()}
    for _ in range(_WARM_UP):
        engine.outputs(first)
    found = _spread(_calls(lambda: engine.outputs(first), options.seconds))
    if options.batch:
        times = _calls(lambda: engine.outputs(text), options.seconds)
        found["throughput"] = 1000 * options.batch * len(times) / sum(times)
    return found


def _decoder(engine: Engine, options: Options, text: Batch) -> dict[str, float]:
    prompt = {key: value[:1] for key, value in text.items()}
    for _ in _steps(engine, prompt, _WARM_UP):
        pass
    prefills, steps = [], []
    start = time.perf_counter()
    while not steps or time.perf_counter() - start < options.seconds:
        first, *rest = _steps(engine, prompt, options.tokens)
        prefills.append(first)
        steps += rest
    found = _spread(steps) | {"prefill_ms": _spread(prefills)["p50"]}
    return found | {"throughput": 1000 * len(steps) / sum(steps)}


def _calls(call: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds of as many calls as fit, at least one."""
    times: list[float] = []
    while sum(times) < 1000 * seconds:
        times.append(_timed(call)[0])
    return times


def _steps(engine: Engine, prompt: Batch, tokens: int) -> Iterator[float]:
    """Milliseconds of the prompt, then of each greedy decode step."""
    taken, (logits, cache) = _timed(lambda: engine.prefill(prompt))
    yield taken
    for _ in range(tokens):
        token = logits[:, -1:].argmax(dim=-1)
        taken, (logits, cache) = _timed(lambda t=token, c=cache: engine.decode(t, c))
        yield taken


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return 1000 * (time.perf_counter() - start), result


def _spread(times: list[float]) -> dict[str, float]:
    values = torch.tensor(times, dtype=torch.float64)
    wanted = torch.tensor([0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    quarter, half, three, most = torch.quantile(values, wanted).tolist()
    return {"p50": half, "p95": most, "iqr": three - quarter}
