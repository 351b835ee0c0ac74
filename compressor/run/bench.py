"""Candidates side by side: quality one after the other, speed in turns (rounds.py).

The quality is that of the artefact itself, in the engine that serves it: never the quality of a
training run beside the speed of an exported file.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from compressor.errors import CompressError
from compressor.model.checkpoint import load_processor, read_task
from compressor.model.manifest import NAME as MANIFEST
from compressor.model.manifest import read_manifest
from compressor.model.sources import Source, describe_source
from compressor.run.candidates import Candidate
from compressor.run.machine import machine
from compressor.run.measuring import measure_options, plain_options
from compressor.run.methods import load_method
from compressor.run.rounds import Round, Turns, median, no_turns, take_turns
from compressor.training.workbench import Workbench

VERSION = 1
MEASURES = ("size", "latency", "memory", "fidelity")
SUFFIXES = ("low", "high", "n")
OWN_COLUMNS = ("parameters", "bytes", "weights_bytes", "peak_memory_bytes", "baseline_bytes")
UNITS = {
    "causal-lm": "tokens/s",
    "feature-extraction": "sentences/s",
    "fill-mask": "sentences/s",
    "text-classification": "sentences/s",
    "image-classification": "images/s",
}


def measure_candidates(
    candidates: Sequence[Candidate],
    work: Workbench,
    measures: Sequence[str] | Mapping[str, Any] = MEASURES,
    threads: int = 1,
    rounds: int = 7,
) -> dict[str, Any]:
    """Measure candidates against the first one.

    Args:
        candidates: checkpoints and artefacts of one task and, where they have one, one tokenizer.
        work: held-out data, progress and scratch; its reference is replaced by the first
            candidate.
        measures: names, or {name: options}, None being its defaults. Size is always measured:
            ratios need it.
        threads: threads of speed and memory; quality runs with what this process uses.
        rounds: turns per candidate.

    Returns:
        The form of `bench --json`. Beyond it: `task`; `tokenizer`, a digest of the vocabulary;
        `measures` {name: options}; `noise` {twice, spread, share}, which decided `noisy`; per
        candidate fingerprint, weights_bytes, baseline_bytes, latency_ms.rounds (p50 of each
        round), ratio.throughput, cores (processor time over wall time), and prefill_ms
        {tokens: ms} of decoders or batches {rows: {p50, throughput}} of the others. What was not
        measured is null.

    Raises:
        CompressError: no candidate, or candidates that answer different questions; a directory
            that cannot be opened; a measure that does not fit the model; a worker that died.
    """
    if not candidates or rounds < 1:
        raise CompressError("nothing to measure", "name at least one directory and one round")
    chosen = _options(measures, threads)
    tokenizer = _refuse_mixture(candidates)
    with tempfile.TemporaryDirectory(dir=work.scratch) as scratch:
        local = dataclasses.replace(work, scratch=Path(scratch))
        numbers = _quality(candidates, local, chosen)
        turns = no_turns(len(candidates))
        if "latency" in chosen:
            turns = take_turns(candidates, local, chosen["latency"], threads, rounds)
    task = read_task(candidates[0].path)
    entries = [
        _entry(candidate, found, speed, UNITS.get(task, "rows/s"))
        for candidate, found, speed in zip(candidates, numbers, turns.rounds, strict=True)
    ]
    for index, entry in enumerate(entries):
        entry["ratio"] = _ratios(entry, entries[0], turns, index)
    return {
        "version": VERSION,
        "machine": machine(),
        "threads": threads,
        "rounds": rounds,
        "noisy": turns.noisy,
        "noise": turns.noise,
        "task": task,
        "tokenizer": tokenizer,
        "measures": {name: plain_options(options) for name, options in chosen.items()},
        "candidates": entries,
    }


def fingerprint(path: Path) -> str:
    """Identity of a model: the manifest's fingerprint, or a digest of a plain checkpoint."""
    if (path / MANIFEST).is_file():
        return read_manifest(path).fingerprint
    return describe_source(Source(path, path.name))["sha256"]


def _options(measures: Sequence[str] | Mapping[str, Any], threads: int) -> dict[str, Any]:
    """{name: validated options}; the number of threads is the bench's, not a measure's."""
    given = measures if isinstance(measures, Mapping) else dict.fromkeys(measures)
    defaults = [name for name in dict.fromkeys(("size", *given)) if given.get(name) is None]
    found = measure_options(defaults) | {k: v for k, v in given.items() if v is not None}
    if "memory" in found:
        found["memory"] = dataclasses.replace(found["memory"], threads=threads)
    return found


def _refuse_mixture(candidates: Sequence[Candidate]) -> str | None:
    """All candidates get the same token ids, so these must mean the same text to all.

    Returns the digest of their vocabulary, or None where none has a tokenizer.
    """
    tasks, known = {}, {}
    for candidate in candidates:
        _ = candidate.engine  # refused here, before anything is measured
        tasks[candidate.name] = read_task(candidate.path)
        processor = load_processor(candidate.path)
        if processor is not None:
            known[candidate.name] = processor.get_vocab()
    first = candidates[0].name
    for name, task in tasks.items():
        if task != tasks[first]:
            raise CompressError(
                f"'{name}' is for {task} and '{first}' for {tasks[first]}",
                "compare models of one task at a time",
            )
    names = list(known)
    for name in names[1:]:
        if known[name] != known[names[0]]:
            raise CompressError(
                f"'{name}' and '{names[0]}' have different tokenizers",
                "compare models of one tokenizer at a time",
            )
    if not known:
        return None
    return hashlib.sha256(json.dumps(sorted(known[names[0]].items())).encode()).hexdigest()


def _quality(
    candidates: Sequence[Candidate], work: Workbench, chosen: dict[str, Any]
) -> list[dict[str, float]]:
    """All measures but latency, one engine open at a time; first, so that mistakes end early."""
    names = [name for name in chosen if name != "latency"]
    found = []
    with work.progress("measuring quality and size", len(candidates) * len(names)) as advance:
        for candidate in candidates:
            numbers: dict[str, float] = {}
            with closing(candidate.open()) as engine:
                # the first candidate leaves its outputs in scratch, so it is not opened again
                first = candidate is candidates[0]
                reference = engine if first else None
                local = dataclasses.replace(
                    work, _reference=lambda e=reference: e or candidates[0].open()
                )
                for name in names:
                    measure = load_method(f"measure.{name}")
                    numbers |= measure.run(engine, chosen[name], local)
                    advance(1)
            found.append(numbers)
    return found


def _entry(
    candidate: Candidate, numbers: dict[str, float], rounds: list[Round], unit: str
) -> dict[str, Any]:
    times = {key: median(rounds, key) for key in ("p50", "p95", "iqr")}
    speed = median(rounds, "throughput")
    path = candidate.path
    batches = {
        size: {"p50": ms, "throughput": median(rounds, f"batch_{size}_throughput")}
        for size, ms in _numbered(rounds, "batch").items()
    }
    return {
        "name": candidate.name,
        "path": path.name if path.is_absolute() else str(path),
        "engine": candidate.engine,
        "fingerprint": fingerprint(path),
        **{key: numbers.get(key) for key in OWN_COLUMNS},
        "latency_ms": times | {"rounds": [r["p50"] for r in rounds]} if rounds else None,
        "prefill_ms": _numbered(rounds, "prefill") or None,
        "batches": batches or None,
        "throughput": None if speed is None else {"unit": unit, "value": speed},
        "cores": median(rounds, "cores"),
        "quality": _nested({k: v for k, v in numbers.items() if k not in OWN_COLUMNS}),
    }


def _numbered(rounds: list[Round], kind: str) -> dict[str, float | None]:
    """{"32": median, ...} of the keys prefill_32, ... of the rounds, smallest number first."""
    parts = {key: key.removeprefix(f"{kind}_") for key in (rounds[0] if rounds else {})}
    numbers = {text: key for key, text in parts.items() if text != key and text.isdigit()}
    return {text: median(rounds, numbers[text]) for text in sorted(numbers, key=int)}


def _nested(quality: dict[str, float]) -> dict[str, dict[str, Any]]:
    """{cosine, cosine_low, ...} as {cosine: {value, low, high, n}}."""
    tails = {f"{name}_{suffix}" for name in quality for suffix in SUFFIXES}
    return {
        name: {"value": value} | {s: quality.get(f"{name}_{s}") for s in SUFFIXES}
        for name, value in quality.items()
        if name not in tails
    }


def _ratios(
    entry: dict[str, Any], first: dict[str, Any], turns: Turns, index: int
) -> dict[str, float | None]:
    def simple(get: Callable[[dict[str, Any]], float | None]) -> float | None:
        ours, theirs = get(entry), get(first)
        return ours / theirs if ours is not None and theirs else None

    return {
        "latency": turns.latency_ratio(index),
        "throughput": simple(lambda e: e["throughput"] and e["throughput"]["value"]),
        "bytes": simple(lambda e: e["bytes"]),
        "peak_memory": simple(lambda e: e["peak_memory_bytes"]),
    }
