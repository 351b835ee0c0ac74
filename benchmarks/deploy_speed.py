"""Times of exported files in turns: `compress bench`'s rounds over a list of candidates."""

from sweep import NOT_RUN

from compressor.measure import latency
from compressor.run.rounds import median, take_turns

ROUNDS = 5
FIRST = "float32, ONNX Runtime"  # what ratios are of


def timed(candidates, work, rounds=ROUNDS):
    """{noisy, noise, ms {name: median p50}, ratio {name: paired}} of candidates on one thread.

    Args:
        candidates: the first is what ratios are of.
    """
    options = latency.Options(batches=(1,), prompts=(), tokens=32)
    turns = take_turns(candidates, work, options, threads=1, rounds=rounds)
    names = [candidate.name for candidate in candidates]
    return {
        **{"noisy": turns.noisy, "noise": turns.noise, "rounds": rounds},
        "ms": {name: median(turns.rounds[i], "p50") for i, name in enumerate(names)},
        "ratio": {name: turns.latency_ratio(i) for i, name in enumerate(names)},
    }


def speed_key(model, group):
    return f"speed {model} {group}"


def speed_of(cells, model, name):
    """[ms, ratio] of a candidate in whichever group it was timed; noisy times are marked."""
    for known, found in cells.found.items():
        if str(known).startswith(f"speed {model} ") and name in found["ms"]:
            mark = " (noisy)" if found["noisy"] else ""
            return [f"{found['ms'][name]:.2f}{mark}", f"{found['ratio'][name]:.2f}"]
    return [NOT_RUN, NOT_RUN]
