"""Whether a sentence encoder finds the passage that answers a query; higher is better, 1 is all.

    recall_at_k = |relevant passages among the k nearest| / |relevant passages|
    ndcg_at_k   = DCG / IDCG,   DCG = sum over i = 1..k of  rel_i / log2(i + 1)

means over queries, where rel_i is 1 when the i-th nearest passage is relevant, and IDCG is the DCG
of all relevant passages in front (Järvelin and Kekäläinen 2002, gains 0 and 1). Nearest is by
cosine, against every passage of the file, exactly and without an index; equal cosines keep the
order of the file. Intervals are over queries (interval.py). A larger pool is a harder task:
compare numbers of the same files only.
"""

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compressor.engines import Engine
from compressor.errors import CompressError
from compressor.measure.embeddings import ENCODERS, embed, text_tokenizer
from compressor.measure.interval import estimate
from compressor.options import options
from compressor.training.tables import read_records
from compressor.training.workbench import Workbench

TASKS = ENCODERS
_AT_ONCE = 256  # queries whose cosines with all passages are in memory
Count = Annotated[int, Field(ge=1)]


@options
class Options:
    """Queries and passages, and how many of these are looked at."""

    pairs: Path = Field(
        description=".csv or .jsonl with query and passage: each passage answers its query; a "
        "query with several stands in several lines"
    )
    passages: Path | None = Field(None, description="file with more passages (column passage)")
    at: tuple[Count, ...] = Field((10,), min_length=1, description="how many nearest passages")
    length: int = Field(128, ge=2, description="tokens per text at most")
    batch: int = Field(32, ge=1, description="texts per forward pass")


def check(options: Options, path: Path) -> None:
    """Raise what `run` would raise of the files and of the model in `path`."""
    text_tokenizer(path)
    _read(options)


def run(engine: Engine, options: Options, work: Workbench) -> dict[str, float]:
    """Search every query among all passages.

    Returns:
        recall_at_K and ndcg_at_K for every K of `at`, with _low, _high and _n (queries).

    Raises:
        CompressError: a file is missing or malformed, or holds no more passages than are looked
            at; the model is no encoder of text.
    """
    relevant, pool = _read(options)
    queries_QH = embed(engine, list(relevant), options.length, options.batch)
    passages_PH = embed(engine, pool, options.length, options.batch)
    place = {passage: index for index, passage in enumerate(pool)}
    wanted = [torch.tensor([place[passage] for passage in found]) for found in relevant.values()]
    nearest_QK = torch.cat(
        [nearest(part, passages_PH, max(options.at)) for part in queries_QH.split(_AT_ONCE)]
    )
    hits = [torch.isin(row, ids) for row, ids in zip(nearest_QK, wanted, strict=True)]
    counts_Q = torch.tensor([len(ids) for ids in wanted], dtype=torch.float64)
    found: dict[str, float] = {}
    ones, each = torch.ones(len(hits)), torch.arange(len(hits))
    for k in sorted(set(options.at)):
        recall_Q, ndcg_Q = scores(torch.stack(hits)[:, :k].double(), counts_Q)
        found |= estimate(recall_Q, ones, each).keys(f"recall_at_{k}")
        found |= estimate(ndcg_Q, ones, each).keys(f"ndcg_at_{k}")
    return found


def nearest(queries_QH: Tensor, passages_PH: Tensor, k: int) -> Tensor:
    """Numbers [Q, k] of the passages with the largest cosines, largest first."""
    order_QP = (queries_QH @ passages_PH.T).argsort(dim=1, descending=True, stable=True)
    return order_QP[:, :k]


def scores(hits_QK: Tensor, relevant_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Recall [Q] and NDCG [Q] from which of the k nearest are relevant, and how many there are."""
    k = hits_QK.shape[1]
    discounts_K = 1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64))
    ideal_Q = discounts_K.cumsum(dim=0)[relevant_Q.clamp(max=k).long() - 1]
    return hits_QK.sum(dim=1) / relevant_Q, hits_QK @ discounts_K / ideal_Q


def _read(options: Options) -> tuple[dict[str, dict[str, None]], list[str]]:
    """{query: its passages} and all distinct passages, in the order of the files."""
    relevant: dict[str, dict[str, None]] = {}
    for _, (query, passage), _ in read_records(_table(options.pairs), [("query", "passage")]):
        relevant.setdefault(query, {})[passage] = None
    pool = {passage: None for found in relevant.values() for passage in found}
    if options.passages is not None:
        columns = [("passage",), ("text",)]
        pool |= {p: None for _, (p,), _ in read_records(_table(options.passages), columns)}
    if len(pool) <= max(options.at):
        raise CompressError(
            f"'{options.pairs.name}' has {len(pool)} distinct passages, and the nearest "
            f"{max(options.at)} are looked at",
            "give more passages, or a smaller number in at: [1]",
        )
    return relevant, list(pool)


def _table(path: Path) -> Path:
    if path.suffix not in (".csv", ".jsonl"):
        raise CompressError(
            f"'{path}' holds no passages", "give a .csv or .jsonl with query and passage"
        )
    return path
