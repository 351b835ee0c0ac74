"""SquareHead on a task: which loss recovers a sparse finetuned decoder, and up to which sparsity?

novels-llama is finetuned with cross entropy on grade-school problems and their solutions: the
teacher. SparseGPT prunes the teacher in one shot and the student is trained with the masks held:
cross entropy alone, with KL (weight 1, temperature 1), or with SquareHead (weight 1). 100 steps of
8 rows of 256 tokens each; the rate of a loss is the best of three on validation problems at 75 %
with seed 0. *Dense, longer* trains the teacher further with cross entropy on the same batches. Loss
is that of the tokens of solutions of held-out problems; the interval is of the difference to the
finetuned dense model, problem by problem (bootstrap, 95 %). 1 to 3 minutes a cell.
"""

import json
import random
import tempfile
from functools import cache, partial
from pathlib import Path

import lab
import torch
from cells import DATA, table
from sweep import NOT_RUN, mean
from torch.nn.functional import cross_entropy

from compressor.distill import ce
from compressor.distill.runner import run as train
from compressor.model.checkpoint import load_directory, save
from compressor.prune import squarehead
from compressor.training.data import DataSpec, load_corpus
from compressor.training.options import Train

TITLE = "SquareHead on grade-school problems"
MODEL, BORDER = "novels-llama", "\nSolution: "
STEPS, BATCH, LENGTH, TUNED = 100, 8, 256, 0.75
LONGEST = 512  # tokens of a problem with its solution that are scored
RATES = (3e-4, 1e-3, 3e-3)
SPARSITIES = (0.75, 0.5, 0.9, 0.6, 0.8, 0.7)
LOSSES = {
    "CE": {"squarehead": 0.0},
    "CE + KL": {"squarehead": 0.0, "kl": 1.0},
    "CE + SquareHead": {},
}


@cache
def corpus():
    """Problems and solutions, split."""
    found = (DATA / "data" / "gsm8k-train-2000.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in found]
    texts = [{"text": f"{line['question']}{BORDER}{line['answer']}"} for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "problems.jsonl")
        file.write_text("\n".join(json.dumps(text) for text in texts), encoding="utf-8")
        return load_corpus(DataSpec(train=[str(file)]), "causal-lm")


@torch.no_grad()
def solution_losses(model, split):
    """For every problem: (nats of the solution's tokens, how many)."""
    found = []
    for document in corpus().documents[split]:
        question, solution = document.text.split(BORDER)
        start = len(model.processor(question + BORDER).input_ids)
        ids = torch.tensor([model.processor(question + BORDER + solution).input_ids[:LONGEST]])
        logits = model.module(input_ids=ids).logits[0, start - 1 : -1]
        loss = cross_entropy(logits, ids[0, start:], reduction="sum")
        found.append((float(loss), len(logits)))
    return found


def per_token(losses):
    """Nats per token of a list of (nats, tokens)."""
    return sum(nats for nats, _ in losses) / sum(count for _, count in losses)


def options_of(lr):
    return Train(
        **{"steps": STEPS, "batch": BATCH, "length": LENGTH, "lr": lr},
        **{"precision": "float32", "snapshot_seconds": 1e6},
    )


def finetuned(start, lr, seed):
    """A model trained with cross entropy on the problems."""
    options = ce.Options(train=options_of(lr))
    with lab.surroundings(corpus(), lambda: lab.original(MODEL), seed, "causal-lm") as work:
        train(start, ce.objective(options, start, None), options, work)
    return start


def measured(model, lr):
    held = solution_losses(model, "heldout")
    validation = per_token(solution_losses(model, "validation"))
    return {"lr": lr, "validation": validation, "heldout": per_token(held), "problems": held}


def dense(lr):
    return measured(finetuned(lab.original(MODEL), lr, 0), lr)


def teacher_of(cells):
    """The finetuned model, made once and kept in the temporary folder."""
    lr = best_rate(cells, "dense")
    folder = Path(tempfile.gettempdir(), f"compress-benchmark-{MODEL}-problems-{STEPS}-{lr:g}")
    if not (folder / "model.safetensors").is_file():
        folder.mkdir(exist_ok=True)
        save(finetuned(lab.original(MODEL), lr, 0), folder, DATA / "checkpoints" / MODEL)
    model = load_directory(folder)
    model.module.requires_grad_(False)
    return model


def longer(cells, lr, seed):
    return measured(finetuned(teacher_of(cells), lr, seed + 1), lr)


def sparse(cells, loss, sparsity, lr, seed):
    """The teacher pruned and trained again."""
    student = teacher_of(cells)
    options = squarehead.Options(
        sparsity=sparsity, **LOSSES[loss], samples=128, length=LENGTH, train=options_of(lr)
    )
    teacher = partial(teacher_of, cells)
    with lab.surroundings(corpus(), teacher, seed + 1, "causal-lm", "train") as work:
        squarehead.run(student, options, work)
    return measured(student, lr) | {"training": student.notes["training"]}


def key(arm, lr, seed=0):
    return f"squarehead {arm} lr {lr:g} seed {seed}"


def arm_of(loss, sparsity):
    return f"{sparsity:g} {loss}"


def best_rate(cells, arm):
    """The rate of the lowest validation loss; None while less than a grid was run."""
    found = [cells.found[key(arm, lr)] for lr in RATES if key(arm, lr) in cells.found]
    if len(found) < len(RATES):
        return None
    return min(found, key=lambda cell: cell["validation"])["lr"]


def run(cells, model, seeds):
    """The teacher, then the grid at one sparsity, then the other sparsities."""
    for lr in RATES:
        cells.run(key("dense", lr), partial(dense, lr))
    for lr in RATES:
        cells.run(key("dense, longer", lr), partial(longer, cells, lr, 0))
    for loss in LOSSES:
        for lr in RATES:
            name = key(arm_of(loss, TUNED), lr)
            cells.run(name, partial(sparse, cells, loss, TUNED, lr, 0))
    for seed in seeds:
        for sparsity in SPARSITIES:
            for loss in LOSSES:
                lr = best_rate(cells, arm_of(loss, TUNED))
                name = key(arm_of(loss, sparsity), lr, seed)
                cells.run(name, partial(sparse, cells, loss, sparsity, lr, seed))


def section(cells):
    """A row for every arm."""
    base = best_rate(cells, "dense")
    if base is None:
        return [NOT_RUN]
    teacher = cells.found[key("dense", base)]
    rows = [_row(cells, "dense", base, teacher)]
    rows.append(_row(cells, "dense, longer", best_rate(cells, "dense, longer"), teacher))
    for sparsity in sorted(SPARSITIES):
        for loss in LOSSES:
            rate = best_rate(cells, arm_of(loss, TUNED))
            rows.append(_row(cells, arm_of(loss, sparsity), rate, teacher))
    header = ["arm", "rate", "nats per token", "seeds", "minus dense", "95 % interval"]
    return [table(header, rows)]


def _row(cells, arm, lr, teacher):
    found = [cells.found.get(key(arm, lr, seed)) for seed in range(10)] if lr else []
    found = [cell for cell in found if cell]
    if not found:
        return [arm, f"{lr:g}" if lr else NOT_RUN, NOT_RUN, 0, NOT_RUN, NOT_RUN]
    value = mean([cell["heldout"] for cell in found])
    low, high = interval(found, teacher)
    apart = f"{value - teacher['heldout']:+.4f}"
    return [arm, f"{lr:g}", f"{value:.4f}", len(found), apart, f"{low:+.4f} to {high:+.4f}"]


def interval(found, teacher, times=2000):
    """95 % of resampled held-out problems, of the difference in nats per token; seeds averaged."""
    draw, own = random.Random(0), teacher["problems"]
    nats = [mean([c["problems"][i][0] for c in found]) - own[i][0] for i in range(len(own))]
    differences = []
    for _ in range(times):
        chosen = draw.choices(range(len(own)), k=len(own))
        differences.append(sum(nats[i] for i in chosen) / sum(own[i][1] for i in chosen))
    differences.sort()
    return differences[int(0.025 * times)], differences[int(0.975 * times) - 1]
