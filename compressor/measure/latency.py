"""Speed of one candidate: one call of `run` is one round, of a fixed time and not a fixed count.

    causal language models  latency: one decode step after a prompt of `length` tokens, 1 row
                            throughput: tokens per second of these steps
                            prefill: prompts of several lengths, each the time to a first token
    all other models        latency: one forward of 1 row
                            throughput: rows per second in forwards of the largest of `batches`
                            batches: latency and rows per second of a forward at each size

Rows are real data without padding (speed_rows.py). Times are wall time in milliseconds of the
engine's call alone, after two calls that do not count. p50, p95 and iqr (p75 - p25) are over the
calls of the round. Whoever compares candidates takes turns round by round and medians over rounds,
as run/rounds.py does: a machine's speed drifts more between minutes than between candidates.
"""

import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
from pydantic import Field

from compressor.engines import Engine
from compressor.measure.inputs import fitting_length
from compressor.measure.speed_rows import speed_rows
from compressor.model.checkpoint import read_task
from compressor.options import options
from compressor.training.workbench import Batch, Workbench

_WARM_UP = 2
Count = Annotated[int, Field(ge=1)]


@options
class Options:
    """The shapes and the time of a round."""

    length: int = Field(128, ge=2, description="tokens of a row, or of a decoder's prompt")
    batches: tuple[Count, ...] = Field((1, 8, 32), description="rows per forward, not of decoders")
    prompts: tuple[Count, ...] = Field((32, 128, 512), description="prompt lengths of a decoder")
    tokens: int = Field(32, ge=1, description="decode steps after a prompt")
    seconds: float = Field(0.3, gt=0, description="time of the latency part of a round, at least")


def run(engine: Engine, options: Options, work: Workbench) -> dict[str, float]:
    """Time one round.

    Returns:
        p50, p95, iqr (ms), length (tokens, as far as the model has positions) and throughput
        (rows or tokens per second). Decoders: prefill_N for prompts of N tokens (ms), as far as
        the model has positions. Others: batch_N and batch_N_throughput for forwards of N rows
        (ms, rows per second); without `batches` no throughput.

    Raises:
        CompressError: there is nothing held out.
    """
    length = fitting_length(engine.path, options.length)
    if read_task(engine.path) != "causal-lm":
        return _forward(engine, options, work, length) | {"length": length}
    length = fitting_length(engine.path, length + options.tokens) - options.tokens
    return _decoder(engine, options, work, length) | {"length": length}


def _forward(engine: Engine, options: Options, work: Workbench, length: int) -> dict[str, float]:
    rows = speed_rows(work, max((1, *options.batches)), length)
    found = _spread(_calls(lambda: engine.outputs(_first(rows, 1)), options.seconds, _WARM_UP))
    for count in sorted(set(options.batches)):
        batch = _first(rows, count)
        times = _calls(lambda b=batch: engine.outputs(b), options.seconds / 3)
        found[f"batch_{count}"] = _spread(times)["p50"]
        found["throughput"] = 1000 * count * len(times) / sum(times)
        found[f"batch_{count}_throughput"] = found["throughput"]
    return found


def _decoder(engine: Engine, options: Options, work: Workbench, length: int) -> dict[str, float]:
    prompt = speed_rows(work, 1, length)
    for _ in _steps(engine, prompt, _WARM_UP):
        pass
    steps: list[float] = []
    start = time.perf_counter()
    while not steps or time.perf_counter() - start < options.seconds:
        _, *rest = _steps(engine, prompt, options.tokens)
        steps += rest
    found = _spread(steps) | {"throughput": 1000 * len(steps) / sum(steps)}
    for wanted in sorted({fitting_length(engine.path, n) for n in options.prompts}):
        text = speed_rows(work, 1, wanted)
        times = _calls(lambda t=text: engine.prefill(t), options.seconds / 3, 1)
        found[f"prefill_{wanted}"] = _spread(times)["p50"]
    return found


def _first(rows: Batch, count: int) -> Batch:
    return {key: value[:count] for key, value in rows.items()}


def _calls(call: Callable[[], Any], seconds: float, warm_up: int = 0) -> list[float]:
    """Milliseconds of as many calls as fit, at least one, after `warm_up` that do not count."""
    for _ in range(warm_up):
        call()
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
