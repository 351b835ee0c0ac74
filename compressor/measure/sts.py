"""Whether a sentence encoder ranks pairs of sentences as people do; 1 is their order, 0 is chance.

    spearman = Pearson correlation of  rank(cosine of the two embeddings)  and  rank(gold score)

Equal values share the mean of their ranks. This is how Sentence-BERT (arXiv 1908.10084) scores
semantic textual similarity. Pairs are drawn anew for the interval, 1,000 times (interval.py). The
pairs are a file of gold scores of its own: no data of the run is read.
"""

import csv
import io
import math
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from compressor.engines import Engine
from compressor.errors import CompressError
from compressor.measure.embeddings import ENCODERS, embed, text_tokenizer
from compressor.measure.interval import bootstrap
from compressor.options import options
from compressor.training.tables import decode, read_records
from compressor.training.workbench import Workbench

TASKS = ENCODERS
_COLUMNS = ("sentence1", "sentence2", "score")


@options
class Options:
    """The pairs, and how they are read."""

    pairs: Path = Field(
        description=".csv or .jsonl with sentence1, sentence2 and score; a .csv of these three "
        "may have no first line with names"
    )
    length: int = Field(128, ge=2, description="tokens per sentence at most")
    batch: int = Field(32, ge=1, description="sentences per forward pass")


def check(options: Options, path: Path) -> None:
    """Raise what `run` would raise of the file of pairs and of the model in `path`."""
    text_tokenizer(path)
    _read_pairs(options.pairs)


def run(engine: Engine, options: Options, work: Workbench) -> dict[str, float]:
    """Rank the pairs.

    Returns:
        spearman with _low, _high and _n (pairs).

    Raises:
        CompressError: the file is missing, malformed, or has one score only; the model is no
            encoder of text, or gives all pairs the same cosine.
    """
    first, second, scores = zip(*_read_pairs(options.pairs), strict=True)
    vectors = embed(engine, [*first, *second], options.length, options.batch)
    a_UH, b_UH = vectors.split(len(first))
    cosines = (a_UH * b_UH).sum(dim=1)
    if bool((cosines == cosines[0]).all()):
        raise CompressError(
            f"'{engine.path.name}' gives all pairs the same cosine, so there is no order",
            "make it again; its log.txt may say why",
        )
    return correlation(cosines, torch.tensor(scores, dtype=torch.float64))


def correlation(x_U: Tensor, y_U: Tensor) -> dict[str, float]:
    """Spearman's rank correlation of two rows of values with its interval, as `run` returns it."""

    def spearman(times_NU: Tensor) -> Tensor:
        a_NU, b_NU = _centred_ranks(x_U, times_NU), _centred_ranks(y_U, times_NU)
        together, a, b = (
            (times_NU * product).sum(dim=1) for product in (a_NU * b_NU, a_NU**2, b_NU**2)
        )
        return together / (a * b).sqrt()

    return bootstrap(spearman, len(x_U)).keys("spearman")


def _centred_ranks(x_U: Tensor, times_NU: Tensor) -> Tensor:
    """Ranks [N, U] minus their mean, where unit u is there times_NU[:, u] times.

    A value shared by c units that c' smaller ones precede has rank c' + (c + 1) / 2.
    """
    values, group_U = x_U.unique(return_inverse=True)
    size_NG = times_NU.new_zeros(len(times_NU), len(values)).index_add(1, group_U, times_NU)
    rank_NG = size_NG.cumsum(dim=1) - size_NG + (size_NG + 1) / 2
    return rank_NG[:, group_U] - (times_NU.sum(dim=1, keepdim=True) + 1) / 2


def _read_pairs(path: Path) -> list[tuple[str, str, float]]:
    """(sentence, sentence, score) of every line.

    Raises:
        CompressError: missing, of another kind, malformed (with the line), or without an order.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise CompressError(
            f"'{path}' holds no pairs of sentences",
            "give a .csv or .jsonl with sentence1, sentence2 and score",
        )
    found = _nameless(path) or [
        (a, b, _score(f"{path.name}:{line}", text))
        for line, (a, b, text), _ in read_records(path, [_COLUMNS], numbers=_COLUMNS[2:])
    ]
    if len({score for *_, score in found}) < 2:
        raise CompressError(
            f"'{path.name}' has no two pairs with different scores, so there is no order",
            "give more pairs",
        )
    return found


def _nameless(path: Path) -> list[tuple[str, str, float]]:
    """Rows of a table of exactly these three columns without their names, else nothing."""
    if path.suffix != ".csv":
        return []
    rows = [row for row in csv.reader(io.StringIO(decode(path), newline="")) if row]
    if not rows or len(rows[0]) != 3 or _number(rows[0][2]) is None:
        return []
    for number, row in enumerate(rows, start=1):
        if len(row) != 3:
            raise CompressError(
                f"{path.name}: row {number} has {len(row)} columns", "three in every row"
            )
    return [(a, b, _score(f"{path.name}: row {n}", c)) for n, (a, b, c) in enumerate(rows, 1)]


def _score(where: str, text: str) -> float:
    value = _number(text)
    if value is None:
        raise CompressError(f"{where}: score '{text}' is no number", "write scores as 0, 2.5, 5")
    return value


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
