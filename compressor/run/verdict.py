"""What the comparison allows to be said, in plain sentences.

In a run, what it made ("ours") is compared with everything it could replace; in a bench, every
candidate is compared with the first.

Differences below three percent are none; a speed difference must also show in every round.
"""

from statistics import median
from typing import Any

from compressor.run.tables import FIDELITY, interval, quality_names

SAME = 0.03
RELATIVE = ("cosine", "cosine_min", "kl", "top1_agreement")  # 1 or 0 of the first candidate
ALONE = 0.999  # a cosine below it is more than the rounding of float arithmetic


def is_ours(candidate: dict[str, Any]) -> bool:
    """Whether a candidate was made by this run (its name says so) or is something it replaces."""
    return str(candidate["name"]).startswith("ours, ")


def roles(bench: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(what is judged, what it is compared with) among the candidates."""
    candidates = bench["candidates"]
    ours = [c for c in candidates if is_ours(c)]
    if ours:
        return ours, [c for c in candidates if not is_ours(c)]
    return candidates[1:], candidates[:1]


def spoken(candidate: dict[str, Any]) -> str:
    """A candidate's name as a sentence can hold it: "ours (onnx)" for "ours, onnx"."""
    name, comma, engine = str(candidate["name"]).partition(", ")
    return f"{name} ({engine})" if comma else name


def verdict(bench: dict[str, Any], domain: str = "") -> list[str]:
    """Sentences that compare what the run made with everything it could replace.

    Args:
        bench: the form of `bench --json`.
        domain: a sentence that says where the held-out documents come from.

    Returns:
        One sentence per comparison, then fidelity; no word on speed when it was noisy.
    """
    judged, others = roles(bench)
    noisy = bool(bench.get("noisy"))
    lines = [sentence(a, b, speed=not noisy) for a in judged for b in others]
    if noisy:
        lines.append(
            "The machine was busy or timings varied too much, so there is no verdict on speed. "
            "Run it again on a quiet machine."
        )
    for candidate in judged or others:
        lines.append(_fidelity(candidate, quality_names(bench), others[0] if judged else None))
        lines.append(_company(candidate))
    return [line for line in [*lines, domain.strip()] if line]


def report_sentences(report: dict[str, Any]) -> list[str]:
    """All that a report says before its tables: the comparison, what zeros gain, the documents."""
    bench = report.get("bench")
    said = [*(verdict(bench) if bench else []), report.get("zeros"), report.get("domain")]
    return [line.strip() for line in said if line]


def sentence(ours: dict[str, Any], other: dict[str, Any], speed: bool = True) -> str:
    """`Against original (torch), ours (onnx) is 3.4x smaller, 2.9x faster and ...`"""
    said = differences(ours, other, speed)
    return f"Against {spoken(other)}, {spoken(ours)} is {listed(said)}." if said else ""


def differences(ours: dict[str, Any], other: dict[str, Any], speed: bool = True) -> list[str]:
    """`3.4x smaller`, `2.9x faster`, `2.0x lower in peak memory`, as far as both are known."""
    memory = ours.get("peak_memory_bytes"), other.get("peak_memory_bytes")
    parts = [
        _ratio(ours.get("bytes"), other.get("bytes"), "{}x smaller", "{}x larger", "equally large"),
        _speed(ours.get("latency_ms") or {}, other.get("latency_ms") or {}) if speed else "",
        _ratio(
            *memory, "{}x lower in peak memory", "{}x higher in peak memory", "equal in peak memory"
        ),
    ]
    return [part for part in parts if part]


def listed(parts: list[str]) -> str:
    """`a, b and c`."""
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def _ratio(ours: float | None, other: float | None, less: str, more: str, same: str) -> str:
    if not ours or not other:
        return ""
    if abs(other / ours - 1) <= SAME:
        return same
    return (less if ours < other else more).format(_times(ours, other))


def _speed(ours: dict[str, Any], other: dict[str, Any]) -> str:
    if not ours.get("p50") or not other.get("p50"):
        return ""
    a, b = (found.get("rounds") or [found["p50"]] for found in (ours, other))
    ratios = [y / x for x, y in zip(a, b, strict=True)]
    times = _times(1.0, median(ratios))
    if min(ratios) > 1 + SAME:
        return f"{times}x faster"
    if max(ratios) < 1 - SAME:
        return f"NOT faster ({times}x slower)"
    return "not measurably faster or slower"


def _times(a: float, b: float) -> str:
    """The ratio of the larger to the smaller; a near tie keeps two decimals."""
    ratio = max(a, b) / min(a, b)
    return f"{ratio:.1f}" if ratio >= 1.15 else f"{ratio:.2f}"


def _fidelity(candidate: dict[str, Any], names: list[str], first: dict[str, Any] | None) -> str:
    """Every quality, beside the first candidate's where it does not compare with that anyway."""
    found = candidate.get("quality") or {}
    theirs = (first or {}).get("quality") or {}
    named = [
        f"{name} {interval(found[name])}"
        + (f" against {interval(theirs[name])}" if name not in RELATIVE and name in theirs else "")
        for name in names
        if name in found and name not in ("batch_cosine", "batch_cosine_min")
    ]
    counts = [q["n"] for name, q in found.items() if name in FIDELITY and q.get("n")]
    if not named:
        return ""
    sample = f" (n = {min(counts)} documents)" if counts else ""
    return f"Quality of {spoken(candidate)}: {', '.join(named)}{sample}."


def _company(candidate: dict[str, Any]) -> str:
    """A warning where vectors depend on their batch (measure/batch_sensitivity.py)."""
    worst = ((candidate.get("quality") or {}).get("batch_cosine_min") or {}).get("value")
    if worst is None or worst >= ALONE:
        return ""
    return (
        f"{spoken(candidate)} gives a text another vector alone than in a batch: "
        f"cosine {worst:.3f} in the worst case."
    )
