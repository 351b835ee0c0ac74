"""Times of exported files in turns: `compress bench`'s rounds over a list of candidates."""

import numpy as np
from sweep import NOT_RUN

from compressor.measure import latency
from compressor.run.rounds import median, take_turns

ROUNDS = 5
FIRST = "float32, ONNX Runtime"  # what ratios are of


def timed(candidates, work, rounds=ROUNDS):
    """{noise, ms {name: median p50}, paired {name: a ratio for every round}}, on one thread.

    Args:
        candidates: the first is what ratios are of.
    """
    options = latency.Options(batches=(1,), prompts=(), tokens=32)
    turns = take_turns(candidates, work, options, threads=1, rounds=rounds)
    names = [candidate.name for candidate in candidates]
    return {
        **{"noise": turns.noise, "rounds": rounds},
        "ms": {name: median(turns.rounds[i], "p50") for i, name in enumerate(names)},
        "paired": {name: turns.paired(i) for i, name in enumerate(names)},
    }


def speed_key(model, group):
    return f"speed {model} {group}"


def speed_of(cells, model, name):
    """[ms, ratio to the first file] of a candidate in whichever group it was timed."""
    for known, found in cells.found.items():
        if str(known).startswith(f"speed {model} ") and name in found["ms"]:
            return [f"{found['ms'][name]:.2f}", shown(found["paired"][name])]
    return [NOT_RUN, NOT_RUN]


def shown(paired):
    """A ratio of times, with the range of its rounds."""
    return f"{np.median(paired):.2f} ({min(paired):.2f} to {max(paired):.2f})"
