"""Sparse and quantized or fewer bits: which is better at equal bytes?

50 % sparse int4 takes 1 bit of mask and 2 of codes a weight, as many as dense 3 bits; 75 % sparse
int4 takes 1 + 1, as many as dense 2 bits. Groups of inputs (32 on stories260K, 64 on novels-llama)
share a scale; what scales and zero points take is not counted. Embeddings and head stay float.
One-shot arms prune and round in one pass (quantize.gptq with `sparse`), dense ones round with GPTQ
and clipped grids, symmetric. With recovery: SparseGPT's mask held, or none, then
quantize.distilled for 500 steps (100 on novels-llama), on symmetric grids (*trained*) or with zero
points and learned steps (*learned*); the same loss, batches and three rates in all arms, more where
the best is at an end. 1 to 2 minutes a cell that trains.
"""

from functools import partial
from itertools import product

import lab
from cells import table
from quantization_trained import CE, MODELS, RATES, options
from sweep import NOT_RUN, best_rate, mean, outcomes, shown, sweep

from compressor.prune import sparsegpt
from compressor.quantize import distilled, gptq

TITLE = "Sparse int4 against fewer dense bits"
ARMS = {  # label: (bits, sparsity, bits of a weight)
    "dense 4 bits": (4, None, 4),
    "dense 3 bits": (3, None, 3),
    "50 % sparse, 4 bits": (4, {"sparsity": 0.5}, 3),
    "2:4 sparse, 4 bits": (4, {"pattern": "2:4"}, 3),
    "dense 2 bits": (2, None, 2),
    "75 % sparse, 4 bits": (4, {"sparsity": 0.75}, 2),
}
WAYS = {  # label: what quantize.distilled takes besides
    "trained": {},
    "learned": {"symmetric": False, "steps": "learned"},
}


def cell(model, arm, way, seed, lr=None):
    """Losses after an arm."""
    bits, sparse, _ = ARMS[arm]
    student = lab.original(model)
    grid = {"bits": bits, "group": MODELS[model][0], "uneven": "channel"}
    floats = {"embeddings": False, "head": False}
    data = {"samples": lab.CALIBRATION, "length": lab.LENGTH}
    with lab.workbench(model, seed, calibration="train") as work:
        work.teacher.module.requires_grad_(False)
        if way == "one-shot":
            chosen = gptq.Options(**grid, **floats, **data, clip="mse", sparse=sparse)
            gptq.run(student, chosen, work)
        else:
            if sparse is not None:
                sparsegpt.run(student, sparsegpt.Options(**sparse, **data), work)
            trained = {"ce": CE, "train": options(model, lr)}
            chosen = distilled.Options(**grid, **floats, **trained, **WAYS[way])
            distilled.run(student, chosen, work)
    splits = {s: lab.loss(student, lab.rows(model, s)) for s in ("validation", "heldout")}
    kept = [form.sparsity for form in student.formats.values() if form.bits]
    return splits | {"lr": lr, "sparsity": mean(kept)}


def prefix(model, arm, way):
    return f"bytes {model} {arm} {way}"


def run(cells, model, seeds):
    """One-shot, then what trains."""
    for arm in ARMS:
        for seed in seeds:
            name = f"{prefix(model, arm, 'one-shot')} seed {seed}"
            cells.run(name, partial(cell, model, arm, "one-shot", seed))
    for way, arm in product(WAYS, ARMS):
        make = partial(cell, model, arm, way)
        sweep(cells, prefix(model, arm, way), make, seeds, RATES, grows=True)


def section(cells):
    """A table for every model."""
    blocks = []
    for model in MODELS:
        rows = []
        for arm, (_, _, size) in ARMS.items():
            found = [
                cells.found.get(f"{prefix(model, arm, 'one-shot')} seed {seed}")
                for seed in range(10)
            ]
            at_once = shown([c["heldout"] for c in found if c])
            row = [arm, str(size), *at_once]
            for way in WAYS:
                name = prefix(model, arm, way)
                rate = best_rate(cells, name)
                row += [f"{rate:g}" if rate else NOT_RUN, *shown(outcomes(cells, name))]
            rows.append(row)
        header = ["arm", "bits a weight", "one-shot", "over seeds", "seeds"]
        for way in WAYS:
            header += ["best rate", way, "over seeds", "seeds"]
        blocks += [f"### {model}", table(header, rows)]
    return blocks
