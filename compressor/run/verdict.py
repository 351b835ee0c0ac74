"""What the comparison allows to be said, in plain sentences.

The last candidate is the result of the run; every earlier one is something it could replace. A
speed difference counts only when it is larger than the spread of the two measurements.
"""

from typing import Any

from compressor.run.tables import FIDELITY, interval, quality_names

SAME = 0.03  # sizes within three percent are called equal


def verdict(bench: dict[str, Any], domain: str = "") -> list[str]:
    """Sentences that compare the last candidate with each of the others.

    Args:
        bench: the form of `bench --json`.
        domain: says where the held-out documents come from.

    Returns:
        One sentence per comparison and one for fidelity; only the reason when it was noisy.
    """
    if bench.get("noisy"):
        return [
            "The machine was busy while this was measured: the timings vary too much, "
            "so there is no verdict on speed. Run it again on a quiet machine.",
            *_fidelity(bench, domain),
        ]
    *others, ours = bench["candidates"]
    compared = [sentence(ours, other) for other in others]
    return [text for text in compared if text] + _fidelity(bench, domain)


def sentence(ours: dict[str, Any], other: dict[str, Any]) -> str:
    """`ours is 3.4x smaller, 2.9x faster and needs 1.8x less memory than other.`"""
    parts = [
        _ratio(ours.get("bytes"), other.get("bytes"), "smaller", "larger", "the same size"),
        _speed(ours.get("latency_ms") or {}, other.get("latency_ms") or {}),
        _ratio(
            ours.get("peak_memory_bytes"),
            other.get("peak_memory_bytes"),
            "lower in peak memory",
            "higher in peak memory",
            "equal in peak memory",
        ),
    ]
    said = [part for part in parts if part]
    if not said:
        return ""
    listed = ", ".join(said[:-1]) + (" and " if len(said) > 1 else "") + said[-1]
    return f"Against {other['name']}, {ours['name']} is {listed}."


def _ratio(ours: float | None, other: float | None, less: str, more: str, same: str) -> str:
    if not ours or not other:
        return ""
    if abs(other / ours - 1) <= SAME:
        return same
    return f"{other / ours:.1f}x {less}" if ours < other else f"{ours / other:.1f}x {more}"


def _speed(ours: dict[str, Any], other: dict[str, Any]) -> str:
    a, b = ours.get("p50"), other.get("p50")
    if not a or not b:
        return ""
    spread = max(ours.get("iqr") or 0.0, other.get("iqr") or 0.0, SAME * b)
    if abs(a - b) <= spread:
        return "not measurably faster"
    return f"{b / a:.1f}x faster" if a < b else f"not faster ({a / b:.1f}x slower)"


def _fidelity(bench: dict[str, Any], domain: str) -> list[str]:
    ours = bench["candidates"][-1]
    found = ours.get("quality") or {}
    named = [f"{k} {interval(found[k])}" for k in quality_names(bench) if k in found]
    if not named:
        return []
    counts = [q["n"] for k, q in found.items() if k in FIDELITY and q.get("n")]
    sample = f", n = {min(counts)}" if counts else ""
    where = f" {domain.strip()}" if domain else ""
    return [f"Quality of {ours['name']}: {'; '.join(named)}{sample}.{where}"]
