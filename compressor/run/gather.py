"""What runs and benches have measured, read from their directories and checked against each other.

Numbers are compared only where they mean the same: quality on the same held-out data with the same
measure, speed on the same machine with the same threads and shapes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import CompressError
from compressor.run.candidates import short_names
from compressor.run.layout import SOURCE
from compressor.run.tables import quality_names, threads

# one of these is what a comparison is about: what a task asks for before mere likeness
PREFERRED = ("wer", "accuracy", "spearman", "ndcg_at_10", "recall_at_10", "perplexity")
PREFERRED += ("bits_per_byte", "cosine", "top1_agreement", "kl")
# the measure that gives a key, where it is not its namesake; all others are tasks of lm_eval
FROM = {"bits_per_byte": "perplexity", "spearman": "sts"}
FROM |= dict.fromkeys(("cosine", "cosine_min", "top1_agreement", "kl", "ece"), "fidelity")
FROM |= dict.fromkeys(("batch_cosine", "batch_cosine_min"), "batch_sensitivity")
RELATIVE = ("cosine", "cosine_min", "top1_agreement", "kl")  # to the first candidate
PER_TOKEN = ("perplexity", "top1_agreement", "kl", "ece")  # of one tokenizer; bits_per_byte is not
DRIFT = 0.05  # shared candidates that differ more than this in two runs are worth a word


@dataclass(frozen=True)
class Measured:
    """One RUN: its short name and the `bench --json` form it holds."""

    name: str
    bench: dict[str, Any]

    @property
    def first(self) -> dict[str, Any]:
        """The candidate that all others of this run are compared with."""
        return self.bench["candidates"][0]


def read_runs(runs: Sequence[str]) -> list[Measured]:
    """Read run directories and bench directories.

    Raises:
        CompressError: one is missing, unfinished, measured nothing, or is something else.
    """
    if not runs:
        raise CompressError("nothing to compare", "compress compare RUN [RUN ...]")
    return [Measured(name, _read(run)) for name, run in zip(short_names(runs), runs, strict=True)]


def _read(run: str) -> dict[str, Any]:
    path = Path(run).expanduser()
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CompressError(f"'{run}' {what}", "name the --out directory of run or bench")
    if (path / SOURCE).is_dir():
        if not (path / "report.json").is_file():
            raise CompressError(
                f"the run in '{run}' is not finished: it has no report.json",
                f"finish it with compress run PROFILE --out {run}",
            )
        bench = _json(path / "report.json").get("bench")
        if bench is None:
            raise CompressError(
                f"the run in '{run}' measured nothing",
                "give its profile measures: and data:, or measure with compress bench",
            )
    elif (path / "bench.json").is_file():
        bench = _json(path / "bench.json")
    else:
        hint = "name the --out directory of run or bench"
        if (path / "config.json").is_file():
            hint = f"models are measured with compress bench {run} --out D"
        raise CompressError(f"'{run}' is neither a run nor a bench", hint)
    if "data" not in bench:
        raise CompressError(
            f"'{run}' was measured by an older version, which did not note on what data",
            "run the same command again: it measures anew",
        )
    return bench


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompressError(f"{file} is damaged ({error})", "make it again") from error
    if not isinstance(found, dict):
        raise CompressError(f"{file} is damaged: it is no JSON object", "make it again")
    return found


def common_quality(runs: Sequence[Measured]) -> str:
    """The quality key that means the same in all runs.

    Raises:
        CompressError: they are of different tasks or data, or share no such key.
    """
    first = runs[0]
    for other in runs[1:]:
        a, b = first.bench, other.bench
        if a["task"] != b["task"]:
            raise CompressError(
                f"'{first.name}' is of models for {a['task']} and '{other.name}' for {b['task']}",
                "compare runs of one task at a time",
            )
        if a["data"]["sha256"] != b["data"]["sha256"]:
            raise CompressError(
                f"'{first.name}' and '{other.name}' measured quality on different data "
                f"({a['data']['name']} and {b['data']['name']}), so their numbers say nothing "
                "about each other",
                "measure their models together: compress bench A B --data F",
            )
    found = [set(quality_names(run.bench)) for run in runs]
    shared = set.intersection(*found)
    for key in (*PREFERRED, *sorted(shared - set(PREFERRED))):
        if key in shared and all(_same_meaning(key, first, other) for other in runs[1:]):
            return key
    named = zip(runs, found, strict=True)
    each = "; ".join(f"{run.name}: {', '.join(sorted(keys)) or 'none'}" for run, keys in named)
    raise CompressError(
        f"no quality was measured in the same way by all ({each})",
        "measure their models together: compress bench A B --data F",
    )


def _same_meaning(key: str, a: Measured, b: Measured) -> bool:
    """Same options of the measure; the same reference or tokenizer where the key depends on it."""
    measure = _measure_of(key, a.bench)
    return (
        a.bench["measures"].get(measure) == b.bench["measures"].get(measure)
        and (key not in RELATIVE or a.first["fingerprint"] == b.first["fingerprint"])
        and (key not in PER_TOKEN or a.bench["tokenizer"] == b.bench["tokenizer"])
    )


def _measure_of(key: str, bench: dict[str, Any]) -> str:
    if key in FROM or key in bench["measures"]:
        return FROM.get(key, key)
    return "retrieval" if key.startswith(("recall_at_", "ndcg_at_")) else "lm_eval"


def no_common_speed(runs: Sequence[Measured]) -> str:
    """Why the speeds of the runs cannot be compared, in a sentence; "" when they can."""
    first = runs[0]
    for run in runs:
        if "latency" not in run.bench["measures"]:
            return f"Speed is not compared: {run.name} did not measure it."
    for other in runs[1:]:
        a, b = first.bench, other.bench
        if a["machine"]["cpu"] != b["machine"]["cpu"] or a["threads"] != b["threads"]:
            return (
                f"Speed is not compared: {first.name} was timed with {_where(a)}, {other.name} "
                f"with {_where(b)}."
            )
        if a["measures"]["latency"] != b["measures"]["latency"]:
            return f"Speed is not compared: {first.name} and {other.name} timed different shapes."
    return ""


def _where(bench: dict[str, Any]) -> str:
    return f"{threads(bench['threads'])} of {bench['machine']['cpu']}"


def noisy_ones(runs: Sequence[Measured]) -> list[str]:
    """Names of the runs whose timings varied too much to be used."""
    return [run.name for run in runs if run.bench["noisy"]]


def scales(runs: Sequence[Measured]) -> dict[str, float]:
    """By what the milliseconds of each run are multiplied to be those of the first one.

    Where all runs timed the same first candidate, it is the yardstick: a machine that was slower
    on another day slowed the yardstick too. Otherwise milliseconds are taken as they are.
    """
    anchors = {(run.first["fingerprint"], run.first["engine"]) for run in runs}
    calm = [run for run in runs if not run.bench["noisy"]]
    if len(anchors) > 1 or not calm:
        return {run.name: 1.0 for run in runs}
    yardstick = calm[0].first["latency_ms"]["p50"]
    return {run.name: yardstick / run.first["latency_ms"]["p50"] for run in calm}


def drift(runs: Sequence[Measured], by: dict[str, float]) -> str:
    """A sentence where the machine had another speed in one of the runs, else ""."""
    moved = [name for name, scale in by.items() if abs(scale - 1) > DRIFT]
    if not moved:
        return ""
    shared = runs[0].first["name"]
    return (
        f"The machine had another speed in {', '.join(moved)}; latencies there are scaled by that "
        f"of {shared}, which all of them timed."
    )
