"""A table of text, and how numbers are written in one.

Terminal, report.md and report.html show these same tables, so they cannot disagree. Sizes are in
MB (1e6 bytes), times in ms or as m:ss, intervals as [low, high].
"""

from dataclasses import dataclass
from typing import Any

FIDELITY = ("cosine", "top1_agreement", "accuracy", "spearman", "ndcg_at_10", "recall_at_10", "wer")
FIDELITY += ("kl", "perplexity", "bits_per_byte", "batch_cosine", "ece")
LOWER_IS_BETTER = ("kl", "perplexity", "bits_per_byte", "wer", "ece", "brier_score", "_ter")
MISSING = "-"
ENGINES = {"onnxruntime": "onnx", "onnxruntime-genai": "genai"}  # how a narrow column calls them


@dataclass(frozen=True)
class Table:
    """A title, a header and rows of text; the first column is left-aligned, the rest right."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    prose: bool = False  # text that reads from the left and may wrap


def megabytes(count: float | None) -> str:
    """Bytes as MB, three significant digits."""
    return MISSING if count is None else significant(count / 1e6)


def millions(count: float | None) -> str:
    """A number of parameters as 22.7M (or 260k for small ones)."""
    if count is None:
        return MISSING
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"


def significant(value: float | None, digits: int = 3) -> str:
    """A number with three significant digits and no exponent."""
    if value is None:
        return MISSING
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{float(f'{value:.{digits}g}'):.6f}".rstrip("0").rstrip(".")


def clock(seconds: float | None) -> str:
    """Seconds as 0.4 s, 12 s or 3:05 (m:ss)."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def threads(count: int | None) -> str:
    """1 thread, 2 threads."""
    return f"{count} thread{'' if count == 1 else 's'}"


def interval(quality: dict[str, Any] | None) -> str:
    """0.972 [0.968, 0.976] or 38.21 [36.02, 40.55]; the value alone where there is no interval."""
    value = (quality or {}).get("value")
    if quality is None or value is None:
        return MISSING
    low, high = quality.get("low"), quality.get("high")
    decimals = next((d for d, most in ((3, 10), (2, 100), (1, 1000)) if abs(value) < most), 0)
    if low is None or high is None:
        return f"{value:.{decimals}f}"
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def quality_names(bench: dict[str, Any]) -> list[str]:
    """Quality keys that any candidate has, the one shown in the main table first."""
    found = {key for c in bench["candidates"] for key in c.get("quality") or {}}
    return [k for k in FIDELITY if k in found] + sorted(found - set(FIDELITY))


def lower_is_better(name: str) -> bool:
    """Whether a small value of a quality is a good one; tasks of lm-eval end with their metric."""
    return name.endswith(LOWER_IS_BETTER)


def facts(value: Any) -> str:
    """A small dict, list or number in one line of text."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {facts(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(facts(v) for v in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return MISSING if value is None else str(value)
