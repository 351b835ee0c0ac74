"""Candidates side by side: quality one after the other, speed in turns.

Speed: one fresh worker process per candidate, all open, only one working at a time. A round gives
every candidate one turn; the order rotates from round to round. Numbers are medians over rounds,
ratios are formed within a round, against the first candidate, before their median is taken, so
that a machine that slows down for a minute slows both sides of a ratio.

Noise: the first candidate has two turns per round. Where its two medians differ by more than
TWICE, or the quartiles of its rounds lie further apart than SPREAD, the result is called noisy.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.engines import engine_name, open_engine
from compressor.errors import CompressError
from compressor.measure import latency
from compressor.measure.inputs import heldout
from compressor.measure.process import Worker
from compressor.measure.worker import save_text
from compressor.model.checkpoint import load_processor, read_task
from compressor.run.machine import machine
from compressor.run.methods import load_method
from compressor.training.workbench import Workbench

VERSION = 1
MEASURES = ("size", "latency", "memory", "fidelity")
TWICE = 0.05
SPREAD = 0.15
SUFFIXES = ("low", "high", "n")

Round = dict[str, float]


@dataclass(frozen=True)
class Candidate:
    """A directory to measure and what tables call it."""

    name: str
    path: Path


def bench(
    candidates: Sequence[Candidate],
    work: Workbench,
    measures: Sequence[str] | Mapping[str, Any] = MEASURES,
    threads: int = 1,
    rounds: int = 7,
) -> dict[str, Any]:
    """Measure candidates against the first one.

    Args:
        candidates: checkpoints and artefacts that read text with the same tokenizer.
        work: held-out text, progress and scratch; its reference is replaced by the first
            candidate.
        measures: names, or {name: options}. Size is always measured: ratios need it.
        threads: threads of speed and memory; quality runs with what this process uses.
        rounds: turns per candidate.

    Returns:
        The form of `bench --json`. Beyond it: per candidate weights_bytes, baseline_bytes,
        prefill_ms (decoders), latency_ms.rounds (p50 of each round) and ratio.throughput; `noise`
        {twice, spread} with the shares that decided `noisy`. What was not measured is null.

    Raises:
        CompressError: no candidate or a mixture of tokenizers; a directory that cannot be
            opened; a measure that does not fit the model; a worker that died.
    """
    if not candidates or rounds < 1:
        raise CompressError("nothing to measure", "name at least one directory and one round")
    chosen = _options(measures, threads)
    _refuse_mixture(candidates)
    with tempfile.TemporaryDirectory(dir=work.scratch) as scratch:
        local = dataclasses.replace(work, scratch=Path(scratch))
        numbers = _quality(candidates, local, chosen)
        turns: list[list[Round]] = [[] for _ in range(len(candidates) + 1)]
        if "latency" in chosen:
            turns = _speed(candidates, local, chosen["latency"], threads, rounds)
    entries = [
        _entry(candidate, found, speed, _units(candidate))
        for candidate, found, speed in zip(candidates, numbers, turns[:-1], strict=True)
    ]
    for entry, speed in zip(entries, turns[:-1], strict=True):
        entry["ratio"] = _ratios(entry, entries[0], speed, (turns[0], turns[-1]))
    noise = _noise(turns[0], turns[-1])
    return {
        "version": VERSION,
        "machine": machine(),
        "threads": threads,
        "rounds": rounds,
        "noisy": bool(noise) and (noise["twice"] > TWICE or noise["spread"] > SPREAD),
        "noise": noise,
        "candidates": entries,
    }


def _options(measures: Sequence[str] | Mapping[str, Any], threads: int) -> dict[str, Any]:
    """{name: validated options}; the number of threads is the bench's, not a measure's."""
    given = measures if isinstance(measures, Mapping) else dict.fromkeys(measures)
    found: dict[str, Any] = {}
    for name in dict.fromkeys(("size", *given)):
        options = given.get(name)
        found[name] = load_method(f"measure.{name}").Options() if options is None else options
    if "memory" in found:
        found["memory"] = dataclasses.replace(found["memory"], threads=threads)
    return found


def _refuse_mixture(candidates: Sequence[Candidate]) -> None:
    """All candidates get the same token ids, so these must mean the same text to all."""
    known: dict[str, Any] = {}
    for candidate in candidates:
        engine_name(candidate.path)
        processor = load_processor(candidate.path)
        if processor is not None:
            known[candidate.name] = processor.get_vocab()
    names = list(known)
    for name in names[1:]:
        if known[name] != known[names[0]]:
            raise CompressError(
                f"'{name}' and '{names[0]}' have different tokenizers",
                "compare models of one tokenizer at a time",
            )


def _quality(
    candidates: Sequence[Candidate], work: Workbench, chosen: dict[str, Any]
) -> list[dict[str, float]]:
    """All measures but latency, one engine open at a time; first, so that mistakes end early."""
    names = [name for name in chosen if name != "latency"]
    found = []
    with work.progress("measuring quality and size", len(candidates) * len(names)) as advance:
        for candidate in candidates:
            numbers: dict[str, float] = {}
            with closing(open_engine(candidate.path)) as engine:
                # the first candidate leaves its outputs in scratch, so it is not opened again
                first = candidate is candidates[0]
                reference = engine if first else None
                local = dataclasses.replace(
                    work, _reference=lambda e=reference: e or open_engine(candidates[0].path)
                )
                for name in names:
                    measure = load_method(f"measure.{name}")
                    numbers |= measure.run(engine, chosen[name], local)
                    advance(1)
            found.append(numbers)
    return found


def _speed(
    candidates: Sequence[Candidate],
    work: Workbench,
    options: latency.Options,
    threads: int,
    rounds: int,
) -> list[list[Round]]:
    """Rounds of every candidate, and of the first one's second turn at the end of the list."""
    text = work.scratch / "text.safetensors"
    save_text(heldout(work, max(1, options.batch), 8, options.length), text)
    request = dataclasses.asdict(options)
    again = request | {"batch": 0}  # the second turn only has to repeat the latency
    turns: list[list[Round]] = [[] for _ in range(len(candidates) + 1)]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(closing(Worker(c.name, c.path, text, threads))) for c in candidates
        ]
        for worker in workers:
            worker.hear()
        advance = stack.enter_context(work.progress("measuring speed", rounds * len(turns)))
        for number in range(rounds):
            for turn in _order(number, len(turns)):
                last = turn == len(candidates)
                worker = workers[0 if last else turn]
                turns[turn].append(worker.ask(again if last else request))
                advance(1)
    return turns


def _order(number: int, turns: int) -> list[int]:
    return [(number + i) % turns for i in range(turns)]


def _units(candidate: Candidate) -> str:
    return "tokens/s" if read_task(candidate.path) == "causal-lm" else "sentences/s"


def _median(rounds: list[Round], key: str) -> float | None:
    values = [r[key] for r in rounds if key in r]
    return float(np.median(values)) if values else None


def _entry(
    candidate: Candidate, numbers: dict[str, float], rounds: list[Round], unit: str
) -> dict[str, Any]:
    own = ("parameters", "bytes", "weights_bytes", "peak_memory_bytes", "baseline_bytes")
    times = {key: _median(rounds, key) for key in ("p50", "p95", "iqr")}
    speed = _median(rounds, "throughput")
    path = candidate.path
    return {
        "name": candidate.name,
        "path": path.name if path.is_absolute() else str(path),
        "engine": engine_name(path),
        **{key: numbers.get(key) for key in own},
        "latency_ms": times | {"rounds": [r["p50"] for r in rounds]} if rounds else None,
        "prefill_ms": _median(rounds, "prefill_ms"),
        "throughput": None if speed is None else {"unit": unit, "value": speed},
        "quality": _nested({k: v for k, v in numbers.items() if k not in own}),
    }


def _nested(quality: dict[str, float]) -> dict[str, dict[str, Any]]:
    """{cosine, cosine_low, ...} as {cosine: {value, low, high, n}}."""
    tails = {f"{name}_{suffix}" for name in quality for suffix in SUFFIXES}
    return {
        name: {"value": value} | {s: quality.get(f"{name}_{s}") for s in SUFFIXES}
        for name, value in quality.items()
        if name not in tails
    }


def _ratios(
    entry: dict[str, Any],
    first: dict[str, Any],
    rounds: list[Round],
    twice: tuple[list[Round], list[Round]],
) -> dict[str, float | None]:
    def simple(get: Callable[[dict[str, Any]], float | None]) -> float | None:
        ours, theirs = get(entry), get(first)
        return ours / theirs if ours is not None and theirs else None

    own = entry is first
    paired = [
        1.0 if own else r["p50"] / ((a["p50"] + b["p50"]) / 2)
        for r, a, b in zip(rounds, *twice, strict=True)
    ]
    return {
        "latency": float(np.median(paired)) if paired else None,
        "throughput": simple(lambda e: e["throughput"] and e["throughput"]["value"]),
        "bytes": simple(lambda e: e["bytes"]),
        "peak_memory": simple(lambda e: e["peak_memory_bytes"]),
    }


def _noise(first: list[Round], second: list[Round]) -> dict[str, float]:
    """How far the two turns of the first candidate, and its rounds, lie apart, as shares."""
    if not first:
        return {}
    a, b = [r["p50"] for r in first], [r["p50"] for r in second]
    quarter, half, three = np.quantile(a + b, [0.25, 0.5, 0.75])
    difference = abs(np.median(a) - np.median(b))
    return {"twice": float(difference / half), "spread": float((three - quarter) / half)}
