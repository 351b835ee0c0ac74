"""What to pick among compared candidates, in one sentence, and what is not faster or smaller.

Of the candidates whose quality is within LOSS of the best, the one with the least bytes times
milliseconds (bytes alone where speed is not compared) is picked.
"""

from typing import Any

from compressor.run.tables import interval
from compressor.run.verdict import SAME, differences, listed, spoken

LOSS = 0.05

Entry = dict[str, Any]


def pick(candidates: list[Entry], key: str, lower: bool) -> tuple[str | None, str]:
    """Name of the pick and the sentence with its reason.

    Args:
        candidates: with name, made, bytes, latency_ms, quality; the first is what they started
            from.
        key: the quality that is compared; `lower` says whether less of it is better.
    """
    known = [c for c in candidates if c["quality"] and c["quality"]["value"] is not None]
    if not known:
        return None, f"There is nothing to pick from: no candidate has a {key}."
    if len(known) == 1:
        alone = known[0]
        return alone["name"], f"{spoken(alone)} is alone: there is nothing to compare it with."
    best = (min if lower else max)(known, key=_quality)
    close = [c for c in known if _loss(c, best, lower) <= LOSS]
    first, cost = known[0], _cost(known)
    chosen = min(close, key=cost)
    if first not in close or cost(first) > cost(chosen) * (1 + SAME):
        return chosen["name"], _reason(chosen, first, best, key)
    return first["name"], _keep(first, known, best, key, lower)


def _keep(first: Entry, known: list[Entry], best: Entry, key: str, lower: bool) -> str:
    """Why to stay with the first: nothing is smaller, or it costs speed, or it costs quality."""
    cheaper = [c for c in known if c["bytes"] * (1 + SAME) < first["bytes"]]
    if not cheaper:
        timed = " or faster" if all(c["latency_ms"] for c in known) else ""
        return f"Keep {spoken(first)}: nothing as good is smaller{timed}."
    nearest = min(cheaper, key=lambda c: _loss(c, best, lower))
    if _loss(nearest, best, lower) <= LOSS:
        gains = listed(_compared(nearest, first))
        return f"Keep {spoken(first)}: {spoken(nearest)} is {gains}, on balance no gain."
    return (
        f"Keep {spoken(first)}: nothing smaller stays within {LOSS:.0%} of the best {key}; the "
        f"nearest, {spoken(nearest)}, is {listed(_compared(nearest, first))}, with "
        f"{_shown(nearest)} against {_shown(first)}."
    )


def truths(candidates: list[Entry], lower: bool) -> list[str]:
    """A sentence for everything made that is not smaller or not faster than what was there.

    And one for everything that another candidate beats in all that was measured.
    """
    found = []
    there = [c for c in candidates if not c["made"]]
    for candidate in (c for c in candidates if c["made"]):
        rivals = [c for c in there if c["run"] == candidate["run"]] or there[:1]
        said = [
            f"{listed(plain)} than {spoken(rival)}"
            for rival in rivals
            if (plain := _not_better(candidate, rival))
        ]
        if said:
            found.append(f"{spoken(candidate)} is {'; '.join(said)}.")
        winner = next((c for c in candidates if _beats(c, candidate, lower)), None)
        if winner:
            timed = ", faster" if candidate["latency_ms"] else ""
            found.append(
                f"Nothing speaks for {spoken(candidate)}: {spoken(winner)} is smaller{timed} and "
                f"better ({_shown(winner)} against {_shown(candidate)})."
            )
    return found


def _beats(winner: Entry, loser: Entry, lower: bool) -> bool:
    """Better in everything that both were measured in."""
    if not winner["quality"] or not loser["quality"] or not winner["bytes"] < loser["bytes"]:
        return False
    a, b = winner["latency_ms"], loser["latency_ms"]
    faster = a["p50"] < b["p50"] if a and b else a is b
    gain = _quality(loser) - _quality(winner)
    return faster and (gain if lower else -gain) > 0


def _not_better(candidate: Entry, rival: Entry) -> list[str]:
    said = []
    if candidate["bytes"] * (1 + SAME) >= rival["bytes"]:
        said.append("not smaller")
    if any("NOT faster" in d or "not measurably" in d for d in _compared(candidate, rival)):
        said.append("not faster")
    return said


def _reason(chosen: Entry, first: Entry, best: Entry, key: str) -> str:
    gains = listed(_compared(chosen, first))
    quality = f"its {key} of {_shown(chosen)}"
    if _shown(chosen) == _shown(best):
        kept = f"{quality} is as good as the best"
    else:
        kept = f"{quality} is within {LOSS:.0%} of the best, {_shown(best)}"
    return f"Pick {spoken(chosen)}: against {spoken(first)} it is {gains}, and {kept}."


def _compared(a: Entry, b: Entry) -> list[str]:
    """Size and speed of a against b; rounds pair only within one run."""
    if a["run"] != b["run"]:
        a, b = ({**c, "latency_ms": _median_only(c["latency_ms"])} for c in (a, b))
    return differences(a | {"peak_memory_bytes": None}, b)


def _median_only(latency: dict[str, Any] | None) -> dict[str, Any] | None:
    return latency and {"p50": latency["p50"]}


def _cost(known: list[Entry]) -> Any:
    timed = all(c["latency_ms"] for c in known)
    return lambda c: c["bytes"] * (c["latency_ms"]["p50"] if timed else 1)


def _quality(candidate: Entry) -> float:
    return candidate["quality"]["value"]


def _loss(candidate: Entry, best: Entry, lower: bool) -> float:
    """How much worse than the best, as a share of it; of kl, whose best is 0, in nats."""
    mine, theirs = _quality(candidate), _quality(best)
    worse = mine - theirs if lower else theirs - mine
    return worse / abs(theirs) if abs(theirs) > 1e-3 else worse


def _shown(candidate: Entry) -> str:
    return interval({"value": _quality(candidate)})
