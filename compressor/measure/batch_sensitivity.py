"""Whether a row's vector depends on the rows beside it in the batch; higher is better, 1 is none.

    batch_cosine     = mean over rows of  <alone, among> / (|alone| |among|)
    batch_cosine_min = the worst row

`alone`: the row as a batch of one, without padding. `among`: the same row in a batch of 16 with
longer rows, so that it is padded. Arithmetic in float gives 1 but for rounding. Activations that
are rounded with one scale for the whole tensor do not: the scale depends on the neighbours, so a
sentence gets another vector each time it is embedded in other company, and a search index made
in batches disagrees with queries that come alone.

The vector is the sentence embedding, or the states of every real token (mean of their cosines)
where no pooling is defined, or the logits of a classifier. The interval of the mean is over
documents (interval.py).
"""

import torch
from pydantic import Field
from torch import Tensor

from compressor.engines import OUTPUTS, Engine
from compressor.errors import CompressError
from compressor.measure.inputs import documents, fitting_length, heldout
from compressor.measure.interval import estimate
from compressor.model.checkpoint import load_processor, read_task
from compressor.options import options
from compressor.training.workbench import Batch, Workbench

TASKS = ("feature-extraction", "fill-mask", "text-classification")


@options
class Options:
    """How many rows are compared, in what company."""

    rows: int = Field(32, ge=1, description="rows embedded twice")
    batch: int = Field(16, ge=2, description="rows of the batch they are embedded in")
    length: int = Field(128, ge=2, description="tokens per row at most")


def run(engine: Engine, options: Options, work: Workbench) -> dict[str, float]:
    """Embed short rows alone and among long ones.

    Returns:
        batch_cosine with _low, _high and _n (documents), and batch_cosine_min.

    Raises:
        CompressError: the model is no encoder of text, or too little text is held out.
    """
    if read_task(engine.path) not in TASKS:
        raise CompressError(
            f"'{engine.path.name}' is no encoder of text, so its rows have no batch sensitivity",
            "leave out batch_sensitivity",
        )
    length = fitting_length(engine.path, options.length)
    ranked = _by_length(heldout(work, 4 * options.rows, options.batch, length))
    short, long = ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :]
    half = options.batch // 2  # of a batch are rows that are looked at, the others its long ones
    if not short:
        raise CompressError(
            "batch sensitivity needs two held-out rows at least", "give more text with --data"
        )
    pad = getattr(load_processor(engine.path), "pad_token_id", None) or 0
    chosen = short[:: -(-len(short) // options.rows)]
    cosines = []
    for start in range(0, len(chosen), half):
        looked_at = [ids for ids, _ in chosen[start : start + half]]
        company = [long[-1 - i % len(long)][0] for i in range(options.batch - len(looked_at))]
        among = _vectors(engine, _padded([*looked_at, *company], pad))
        for i, ids in enumerate(looked_at):
            (alone,) = _vectors(engine, _padded([ids], pad))
            pair = alone, among[i][: len(alone)]
            cosines.append(torch.nn.functional.cosine_similarity(*pair, dim=-1).mean())
    values, owners = torch.stack(cosines), torch.stack([document for _, document in chosen])
    mean = estimate(values, torch.ones(len(values)), owners)
    return mean.keys("batch_cosine") | {"batch_cosine_min": float(values.min())}


def _by_length(batches: list[Batch]) -> list[tuple[Tensor, Tensor]]:
    """Token ids [S] without padding and document [] of every row, short rows first."""
    found, seen = [], 0
    for batch in batches:
        owners = documents(batch, seen)
        seen += len(owners)
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), owners, strict=True)
        found += [(ids[real], owner) for ids, real, owner in rows]
    return sorted(found, key=lambda row: len(row[0]))


def _padded(rows: list[Tensor], pad: int) -> Batch:
    """Rows padded on the right to the longest, [B, S] int64."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    real = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < real[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def _vectors(engine: Engine, batch: Batch) -> list[Tensor]:
    """Per row what is compared [P, width], float64: one pooled vector, or its real tokens."""
    outputs = engine.outputs(batch)
    value = outputs[next(name for name in OUTPUTS if name in outputs)].double()
    if value.dim() == 2:
        return [row[None] for row in value]
    keep = batch["attention_mask"].bool()
    return [row[real] for row, real in zip(value, keep, strict=True)]
