"""How close a candidate's outputs are to those of the reference, on held-out rows.

    encoders:    cosine = mean over rows of  <v, r> / (|v| |r|)     v, r: sentence embeddings, or
                 the states of every real token where no pooling is defined
    with logits: kl = mean of  sum_y p_ref(y) ln(p_ref(y) / p(y))   in nats, reference to candidate
                 top1_agreement = share of positions where both have the same most likely answer
                 ece = expected calibration error against the right answers (calibration.py), where
                 there are any: next tokens, hidden tokens, tokens of the answer, labels (gold.py)

Positions are real tokens (padding never counts), of the decoder where there are two stacks; a
classifier has one position per row. `ece` is the candidate's own: the reference has one too where
it is measured, as bench measures its first candidate. The
reference's outputs do not depend on the candidate: they are computed once and kept in the
workbench's scratch, one file per batch, named by the content of the batch. Intervals are over
documents (interval.py).
"""

import hashlib

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.engines import OUTPUTS, Engine
from compressor.measure.calibration import calibration_error, deviations
from compressor.measure.gold import answered
from compressor.measure.inputs import documents, fitting_length, heldout, refuse_nan
from compressor.measure.interval import estimate
from compressor.model.checkpoint import read_task
from compressor.model.forward import output_mask
from compressor.options import options
from compressor.training.workbench import Batch, Workbench

_INPUTS = {"input_ids", "attention_mask", "input_features", "pixel_values"}
_INPUTS |= {"decoder_input_ids", "decoder_attention_mask"}


@options
class Options:
    """How many held-out rows are compared."""

    rows: int = Field(256, ge=1, description="rows compared, taken evenly from the split")
    length: int = Field(128, ge=2, description="tokens per row")
    batch: int = Field(8, ge=1, description="rows per forward pass")


def run(engine: Engine, options: Options, work: Workbench) -> dict[str, float]:
    """Compare an engine with `work.reference`.

    Returns:
        Encoders: cosine with _low, _high, _n (documents), and cosine_min, the worst row. Models
        with logits: kl (nats per position) and top1_agreement, with the same suffixes, and ece
        where there are right answers. Nothing, with a line in the log, where the outputs have
        another width than the reference's.

    Raises:
        CompressError: there is no held-out text.
    """
    length, task = fitting_length(engine.path, options.length), read_task(engine.path)
    sums, weights, owners, calibrated, seen = [], [], [], [], 0
    for batch in heldout(work, options.rows, options.batch, length):
        name, wanted, made_by = _reference(work, batch)
        got = wanted if made_by is engine else engine.outputs(batch).get(name)
        if got is None or got.shape != wanted.shape:
            shape = "nothing" if got is None else list(got.shape)
            work.log(f"fidelity: {name} is {list(wanted.shape)} and {shape}: not comparable")
            return {}
        refuse_nan(work.reference.path if made_by else engine.path, wanted, batch)
        refuse_nan(engine.path, got, batch)
        compare = _divergence if name == "logits" else _cosine
        rows = [compare(*pair) for pair in _positions(wanted, got, output_mask(batch))]
        sums.append(torch.stack([total for total, _ in rows]))
        weights.append(torch.tensor([count for _, count in rows]))
        owners.append(documents(batch, seen))
        calibrated += _calibration(task, got, batch) if name == "logits" else []
        seen += len(rows)
    totals, weight, owner = torch.cat(sums), torch.cat(weights), torch.cat(owners)
    if name != "logits":
        worst = float((totals[:, 0] / weight).min())
        return estimate(totals[:, 0], weight, owner).keys("cosine") | {"cosine_min": worst}
    found = estimate(totals[:, 0], weight, owner).keys("kl")
    found |= estimate(totals[:, 1], weight, owner).keys("top1_agreement")
    if calibrated:
        deviating, counts = (torch.stack(part) for part in zip(*calibrated, strict=True))
        found |= calibration_error(deviating, counts, owner).keys("ece")
    return found


def _calibration(task: str, logits: Tensor, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Per row its deviations [15] and number of answers []; none where nothing is right."""
    found = answered(task, logits, batch)
    if found is None:
        return []
    return [
        (deviations(row_PV[keep_P], answers_P[keep_P]), keep_P.sum())
        for row_PV, answers_P, keep_P in zip(*found, strict=True)
    ]


def _positions(wanted: Tensor, got: Tensor, mask_BS: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Per row, what is compared [P, width] in both: real tokens, patches, or the one vector."""
    if wanted.dim() == 2:
        return [(w[None], g[None]) for w, g in zip(wanted, got, strict=True)]
    if mask_BS is None:
        return list(zip(wanted, got, strict=True))
    keep_BS = mask_BS.bool()
    return [(w[keep], g[keep]) for w, g, keep in zip(wanted, got, keep_BS, strict=True)]


def _cosine(wanted_PH: Tensor, got_PH: Tensor) -> tuple[Tensor, int]:
    """Sum of cosines [1] and number of positions."""
    cosines = torch.nn.functional.cosine_similarity(wanted_PH.double(), got_PH.double(), dim=-1)
    return cosines.sum()[None], len(cosines)


def _divergence(wanted_PV: Tensor, got_PV: Tensor) -> tuple[Tensor, int]:
    """Sums of [nats, agreements] and number of positions."""
    p, q = wanted_PV.double().log_softmax(dim=-1), got_PV.double().log_softmax(dim=-1)
    nats = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    agree = (wanted_PV.argmax(dim=-1) == got_PV.argmax(dim=-1)).double().sum()
    return torch.stack([nats, agree]), len(p)


def _reference(work: Workbench, batch: Batch) -> tuple[str, Tensor, Engine | None]:
    """Name and value of the reference's output, and the engine that had to run for it.

    There is none when the output was kept in scratch; then the reference is not even opened.
    """
    digest = hashlib.sha256()
    for key in sorted(_INPUTS & batch.keys()):
        digest.update(f"{key} {tuple(batch[key].shape)}".encode())
        digest.update(batch[key].contiguous().numpy().tobytes())
    file = work.scratch / f"reference-{digest.hexdigest()[:24]}.safetensors"
    if file.is_file():
        name, value = next(iter(load_file(file).items()))
        return name, value, None
    outputs = work.reference.outputs(batch)
    name = next(name for name in OUTPUTS if name in outputs)
    temporary = file.with_suffix(".tmp")
    save_file({name: outputs[name].contiguous()}, temporary)
    temporary.rename(file)
    return name, outputs[name], work.reference
