"""`compress compare`: what many runs made, as Pareto fronts of quality against size and speed.

A candidate is on a front when no other is at least as good in both and better in one. Qualities
that look the same in the table count as equal, so that the last bits of a sum decide nothing.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressor.run.front_page import page
from compressor.run.front_png import png
from compressor.run.front_table import cost_of
from compressor.run.gather import (
    Measured,
    common_quality,
    drift,
    no_common_speed,
    noisy_ones,
    read_runs,
    scales,
)
from compressor.run.outputs import claim, write_files
from compressor.run.pick import pick, truths
from compressor.run.report import presentable
from compressor.run.tables import interval, lower_is_better
from compressor.run.verdict import roles

VERSION = 1
FILES = ("report.json", "report.html", "front.png")
COSTS = ("bytes", "latency")


def compare(runs: Sequence[str | Path], out: str | Path | None = None) -> dict[str, Any]:
    """Put the candidates of many runs on Pareto fronts and say which to pick.

    Args:
        runs: directories of `compress run`, and of `compress bench --out`.
        out: directory for report.json, report.html and front.png; it holds nothing else.

    Returns:
        {version, runs, quality (the key), lower_is_better, candidates, picked (name), pick
        (sentence), truths, notes (sentences)}. A candidate: name, run, engine, made (or there
        before), parameters, bytes, peak_memory_bytes, latency_ms {p50, rounds} or null, quality
        {value, low, high, n} or null, front (of "bytes", "latency").

    Raises:
        CompressError: a directory is no finished run, or runs measured different things.
    """
    if out is not None:
        claim(Path(out), FILES)
    measured = read_runs([str(run) for run in runs])
    key = common_quality(measured)
    candidates, notes = _candidates(measured, key)
    lower = lower_is_better(key)
    for candidate in candidates:
        candidate["front"] = [c for c in COSTS if _on_front(candidate, candidates, c, lower)]
    picked, sentence = pick(candidates, key, lower)
    found = presentable(
        {
            "version": VERSION,
            "runs": [_run(run) for run in measured],
            "quality": key,
            "lower_is_better": lower,
            "candidates": candidates,
            "picked": picked,
            "pick": sentence,
            "truths": truths(candidates, lower),
            "notes": notes,
        }
    )
    if out is not None:
        content = json.dumps(found, indent=1, allow_nan=False) + "\n"
        files = {"report.html": page(found), "front.png": png(found)}
        write_files(Path(out), {**files, "report.json": content})
    return found


def _run(run: Measured) -> dict[str, Any]:
    kept = ("threads", "rounds", "noisy", "machine", "data", "task")
    return {"name": run.name} | {key: run.bench[key] for key in kept}


def _candidates(runs: Sequence[Measured], key: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Every model once, and the sentences that say what was left out."""
    reason, noisy = no_common_speed(runs), noisy_ones(runs)
    by = {} if reason else scales(runs)
    notes = [reason or drift(runs, by)]
    if noisy and not reason:
        notes.append(
            f"The machine was busy while {', '.join(noisy)} was timed: no speed from there."
        )
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for run in runs:
        judged, _ = roles(run.bench)
        for c in run.bench["candidates"]:
            speed = c["latency_ms"] if run.name in by and not run.bench["noisy"] else None
            entry = {
                "name": c["name"],
                "run": run.name,
                "made": any(c is j for j in judged),
                **{k: c[k] for k in ("engine", "parameters", "bytes", "peak_memory_bytes")},
                "latency_ms": speed and _scaled(speed, by[run.name]),
                "quality": _known(c["quality"].get(key)),
            }
            same = c["fingerprint"], c["engine"], c["bytes"]
            known = found.setdefault(same, entry)
            if entry["latency_ms"] and not known["latency_ms"]:  # the known one is of a noisy run
                found[same] = entry
    _distinct_names(list(found.values()))
    return list(found.values()), [note for note in notes if note]


def _scaled(latency: dict[str, Any], scale: float) -> dict[str, Any]:
    return {"p50": latency["p50"] * scale, "rounds": [ms * scale for ms in latency["rounds"]]}


def _distinct_names(candidates: list[dict[str, Any]]) -> None:
    """Put the run before the names that several candidates have."""
    names = [c["name"] for c in candidates]
    for candidate, name in zip(candidates, names, strict=True):
        if names.count(name) > 1:
            candidate["name"] = f"{candidate['run']}: {name}"


def _on_front(
    candidate: dict[str, Any], everyone: list[dict[str, Any]], cost: str, lower: bool
) -> bool:
    mine = _position(candidate, cost, lower)
    if mine is None:
        return False
    others = [p for c in everyone if c is not candidate and (p := _position(c, cost, lower))]
    return not any(o[0] <= mine[0] and o[1] <= mine[1] and o != mine for o in others)


def _known(quality: dict[str, Any] | None) -> dict[str, Any] | None:
    """A quality that is a number; NaN is stored as null."""
    return quality if quality and quality["value"] is not None else None


def _position(candidate: dict[str, Any], cost: str, lower: bool) -> tuple[float, float] | None:
    """(cost, quality) with less being better in both; None where one of them is unknown."""
    price = cost_of(candidate, cost)
    if price is None or not candidate["quality"]:
        return None
    shown = float(interval({"value": candidate["quality"]["value"]}))
    return price, shown if lower else -shown
