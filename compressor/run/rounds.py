"""Speed in turns: fresh worker processes, one working at a time, and what their rounds say.

A round gives every candidate one turn; the order rotates from round to round. Numbers are medians
over rounds, ratios are formed within a round, against the first candidate, before their median is
taken, so that a machine that slows down for a minute slows both sides of a ratio.

Noise: the first candidate has two turns per round. The result is called noisy where its two medians
differ by more than TWICE, where the quartiles of any candidate's rounds lie further apart than
SPREAD, or where any candidate got less than SHARE of the processors that its threads could use: a
starved process can be slow in every round alike.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np

from compressor.measure import latency
from compressor.measure.inputs import heldout
from compressor.measure.process import Worker
from compressor.measure.worker import save_rows
from compressor.run.candidates import Candidate
from compressor.training.workbench import Workbench

TWICE = 0.05
SPREAD = 0.15
SHARE = 0.8

Round = dict[str, float]


@dataclass(frozen=True)
class Turns:
    """The rounds of every candidate, and those of the first one's second turn."""

    rounds: list[list[Round]]
    again: list[Round]
    threads: int = 1

    @property
    def noise(self) -> dict[str, float]:
        """{twice, spread, share}, or nothing where speed was not measured.

        How far the first candidate's two turns lie apart; how far the rounds of a candidate do, at
        most; the share of its threads' processors that a candidate got, at least.
        """
        if not self.again:
            return {}
        first, *others = self.rounds
        a, b = (float(np.median([r["p50"] for r in turn])) for turn in (first, self.again))
        timed = [first + self.again, *others]
        return {
            "twice": abs(a - b) / float(np.median([r["p50"] for r in timed[0]])),
            "spread": max(_spread([r["p50"] for r in turn]) for turn in timed),
            "share": min(float(np.median([r["cores"] for r in turn])) for turn in timed)
            / self.threads,
        }

    @property
    def noisy(self) -> bool:
        """Whether a candidate disagrees with itself or was starved."""
        noise = self.noise
        return bool(noise) and (
            noise["twice"] > TWICE or noise["spread"] > SPREAD or noise["share"] < SHARE
        )

    def paired(self, index: int) -> list[float]:
        """A candidate's p50 in every round, over the mean of the first one's two turns in it."""
        rounds = zip(self.rounds[index], self.rounds[0], self.again, strict=True)
        return [r["p50"] / ((a["p50"] + b["p50"]) / 2) for r, a, b in rounds]

    def latency_ratio(self, index: int) -> float | None:
        """Median over rounds of a candidate's p50 to the first one's."""
        if not self.again:
            return None
        return 1.0 if index == 0 else float(np.median(self.paired(index)))


def _spread(values: list[float]) -> float:
    """Distance of the quartiles, as a share of the median."""
    quarter, half, three = np.quantile(values, [0.25, 0.5, 0.75])
    return float((three - quarter) / half)


def no_turns(candidates: int) -> Turns:
    """What there is where speed is not measured."""
    return Turns([[] for _ in range(candidates)], [])


def take_turns(
    candidates: Sequence[Candidate],
    work: Workbench,
    options: latency.Options,
    threads: int,
    rounds: int,
) -> Turns:
    """Time all candidates, `rounds` turns each.

    Raises:
        CompressError: a worker was killed or refused its candidate.
    """
    rows = work.scratch / "rows.safetensors"
    save_rows(heldout(work, max((1, *options.batches)), 8, options.length), rows)
    request = dataclasses.asdict(options)
    again = request | {"batches": (), "prompts": ()}  # the second turn only repeats the latency
    turns: list[list[Round]] = [[] for _ in range(len(candidates) + 1)]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(closing(Worker(c.name, c.path, rows, threads, c.asked, c.device)))
            for c in candidates
        ]
        for worker in workers:
            worker.hear()
        advance = stack.enter_context(work.progress("measuring speed", rounds * len(turns)))
        for number in range(rounds):
            for turn in order(number, len(turns)):
                last = turn == len(candidates)
                worker = workers[0 if last else turn]
                turns[turn].append(worker.ask(again if last else request))
                advance(1)
    return Turns(turns[:-1], turns[-1], threads)


def order(number: int, turns: int) -> list[int]:
    """Who comes when in a round: every turn takes every place in as many rounds as turns."""
    return [(number + i) % turns for i in range(turns)]


def median(rounds: list[Round], key: str) -> float | None:
    """Median over rounds of one number, or None where no round has it."""
    values = [r[key] for r in rounds if key in r]
    return float(np.median(values)) if values else None
