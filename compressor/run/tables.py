"""The numbers of a run as rows of text, and what they allow to be said.

Terminal, report.md and report.html show these same tables, so they cannot disagree. Sizes are in
MB (1e6 bytes), times in ms or as m:ss, intervals as [low, high].
"""

from dataclasses import dataclass
from typing import Any

FIDELITY = ("cosine", "top1_agreement", "accuracy", "spearman", "kl", "perplexity", "bits_per_byte")
FIDELITY += ("batch_cosine",)
LOWER_IS_BETTER = ("kl", "perplexity", "bits_per_byte")
MISSING = "-"
_ABREAST = 3  # intervals that fit beside each other on a screen
ENGINES = {"onnxruntime": "onnx"}  # how a narrow column calls them


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


def interval(quality: dict[str, Any] | None) -> str:
    """0.972 [0.968, 0.976] or 38.21 [36.02, 40.55]; the value alone where there is no interval."""
    if not quality or quality.get("value") is None:
        return MISSING
    value, low, high = (quality.get(k) for k in ("value", "low", "high"))
    decimals = next((d for d, most in ((3, 10), (2, 100), (1, 1000)) if abs(value) < most), 0)
    if low is None or high is None:
        return f"{value:.{decimals}f}"
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def quality_names(bench: dict[str, Any]) -> list[str]:
    """Quality keys that any candidate has, the one shown in the main table first."""
    found = {key for c in bench["candidates"] for key in c.get("quality") or {}}
    return [k for k in FIDELITY if k in found] + sorted(found - set(FIDELITY))


def comparison(bench: dict[str, Any]) -> Table:
    """One row per candidate: size, memory, speed and the first quality."""
    candidates = bench["candidates"]
    names = quality_names(bench)
    units = {str(c["throughput"]["unit"]) for c in candidates if c.get("throughput")}
    unit = units.pop() if len(units) == 1 else "items/s"
    states = any("ours" in str(c["name"]) for c in candidates)  # names of a run say the engine
    p50 = "ms/token" if unit == "tokens/s" else "p50 ms"
    header = ("", *(() if states else ("engine",)), "params", "MB", "peak MB", p50, "p95 ms", unit)
    # with several qualities the intervals stand in a table of their own
    shown = interval if len(names) == 1 else _value
    rows = [
        (*_candidate_row(c, not states), *(shown(_quality(c).get(name)) for name in names[:1]))
        for c in candidates
    ]
    circumstances = _threads(bench.get("threads"))
    if bench.get("noisy"):
        circumstances += "; the machine was BUSY, do not rely on ms"
    return Table(f"Side by side ({circumstances})", (*header, *names[:1]), rows)


def _candidate_row(candidate: dict[str, Any], engine: bool) -> tuple[str, ...]:
    latency = candidate.get("latency_ms") or {}
    return (
        str(candidate["name"]),
        *((ENGINES.get(candidate["engine"], candidate["engine"]),) if engine else ()),
        millions(candidate.get("parameters")),
        megabytes(candidate.get("bytes")),
        megabytes(candidate.get("peak_memory_bytes")),
        significant(latency.get("p50")),
        significant(latency.get("p95")),
        significant((candidate.get("throughput") or {}).get("value")),
    )


def _threads(count: int | None) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _quality(candidate: dict[str, Any]) -> dict[str, Any]:
    return candidate.get("quality") or {}


def _value(found: dict[str, Any] | None) -> str:
    return interval({"value": (found or {}).get("value")})


def quality(bench: dict[str, Any]) -> list[Table]:
    """Every quality of every candidate, unless the main table already has all of it."""
    names = quality_names(bench)
    if len(names) < 2:
        return []
    return [_quality_table(bench, names[i : i + _ABREAST]) for i in range(0, len(names), _ABREAST)]


def _quality_table(bench: dict[str, Any], names: list[str]) -> Table:
    rows = [
        (str(c["name"]), *(interval(_quality(c).get(name)) for name in names))
        for c in bench["candidates"]
    ]
    return Table("Quality on held-out documents", ("", *names), rows)


def speed(bench: dict[str, Any]) -> Table | None:
    """Time to the first token by prompt length, or speed by batch size; None without either."""
    candidates = bench["candidates"]
    prompts = _sizes(candidates, "prefill_ms")
    if prompts:
        rows = [
            (str(c["name"]), *(significant((c.get("prefill_ms") or {}).get(n)) for n in prompts))
            for c in candidates
        ]
        header = ("", *(f"prompt of {n}" for n in prompts))
        return Table("Time to the first token, ms", header, rows)
    batches = _sizes(candidates, "batches")
    if not batches:
        return None
    rows = [
        (
            str(c["name"]),
            *(significant((c.get("batches") or {}).get(n, {}).get("p50")) for n in batches),
            *(significant((c.get("batches") or {}).get(n, {}).get("throughput")) for n in batches),
        )
        for c in candidates
    ]
    units = {str(c["throughput"]["unit"]) for c in candidates if c.get("throughput")}
    unit = units.pop() if len(units) == 1 else "rows/s"
    header = ("", *(f"ms, {n}" for n in batches), *(f"/s, {n}" for n in batches))
    return Table(f"Speed by rows per batch: ms per batch, {unit}", header, rows)


def _sizes(candidates: list[dict[str, Any]], key: str) -> list[str]:
    found = {size for c in candidates for size in c.get(key) or {}}
    return sorted(found, key=int)


def stages(report: dict[str, Any]) -> Table:
    """What each stage took against what preflight had planned."""
    header = ("stage", "params", "MB", "time", "planned", "peak MB", "planned")
    rows = [_stage_row(stage) for stage in report["stages"]]
    return Table("Stages", header, rows)


def _stage_row(stage: dict[str, Any]) -> tuple[str, ...]:
    planned = stage.get("planned") or {}
    reused = " (reused)" if stage.get("skipped") else ""
    return (
        f"{stage['name']}{reused}",
        millions(stage.get("parameters")),
        megabytes(stage.get("bytes")),
        clock(stage.get("seconds")),
        clock(planned.get("seconds")),
        megabytes(stage.get("peak_memory_bytes")),
        megabytes(planned.get("peak_memory_bytes")),
    )


def gates(report: dict[str, Any]) -> Table:
    """The two checks of every export: agreement with our reference, fidelity to the float model."""
    header = ("export", "result", "agreement", "tolerance", "fidelity")
    rows = [
        (
            str(gate["name"]),
            "passed" if gate["ok"] else "REFUSED",
            facts(gate.get("agreement")),
            facts(gate.get("tolerance")),
            _fidelity(gate.get("fidelity") or {}),
        )
        for gate in report.get("gates") or []
    ]
    return Table("Checks of the exports", header, rows, prose=True)


def _fidelity(found: dict[str, Any]) -> str:
    """`cosine 0.943 [0.938, 0.951]` from {cosine, cosine_low, cosine_high, ...}."""
    shown = []
    for name in (key for key in FIDELITY if key in found):
        ends = {end: found.get(f"{name}_{end}") for end in ("low", "high")}
        shown.append(f"{name} {interval({'value': found[name]} | ends)}")
    return ", ".join(shown) or MISSING


def circumstances(report: dict[str, Any]) -> Table:
    """Model, machine, packages and seed: what a second run would have to share."""
    machine = report["machine"]
    memory = significant((machine.get("memory_bytes") or 0) / 1e9)
    rows = [_model_row(report["model"])] if "model" in report else []
    rows += [
        ("machine", f"{machine.get('cpu')}, {_threads(machine.get('threads'))}, {memory} GB"),
        ("packages", facts(report.get("packages") or {})),
        *((key, facts(report[key])) for key in ("seed", "data", "speed") if key in report),
        ("time of this run", clock(report.get("seconds"))),
    ]
    notes = [(s["name"], facts(s["notes"]["training"])) for s in report["stages"] if _trained(s)]
    return Table("Circumstances", ("", ""), rows + notes, prose=True)


def _model_row(model: dict[str, Any]) -> tuple[str, str]:
    embedding = millions(model.get("embedding_parameters"))
    total = millions(model.get("parameters"))
    text = f"{model['id']} ({model['family']}, {total} parameters, {embedding} embedding)"
    return "model", text


def _trained(stage: dict[str, Any]) -> bool:
    return bool((stage.get("notes") or {}).get("training"))


def report_tables(report: dict[str, Any]) -> list[Table]:
    """Every table of a report that has rows, in reading order."""
    bench = report.get("bench")
    found = bench_tables(bench) if bench else []
    found += [stages(report), gates(report), circumstances(report)]
    return [table for table in found if table and table.rows]


def bench_tables(bench: dict[str, Any]) -> list[Table]:
    """What a bench says in numbers: side by side, all of quality, speed by shape."""
    by_shape = speed(bench)
    return [comparison(bench), *quality(bench), *([by_shape] if by_shape else [])]


def facts(value: Any) -> str:
    """A small dict, list or number in one line of text."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {facts(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(facts(v) for v in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return MISSING if value is None else str(value)
