"""Grade-school problems and their solutions, for a decoder: the loss of the solutions' tokens."""

import json
import tempfile
from functools import cache
from pathlib import Path

import lab
import torch
from cells import DATA
from torch.nn.functional import cross_entropy

from compressor.training.data import DataSpec, load_corpus
from compressor.training.reading import TEXT

TITLE = "novels-llama on grade-school problems"
TASK, READING = "causal-lm", TEXT
BATCH, LENGTH, RATES = 8, 256, (3e-4, 1e-3, 3e-3)
TEACHER_STEPS, TEACHER_RATES = 100, RATES
LOSS = "nats per token of the solution"
_BORDER = "\nSolution:"  # the space behind it begins the first token of a solution
_LONGEST = 512  # tokens of a problem with its solution that are scored


@cache
def corpus():
    """Problems and solutions, split."""
    found = (DATA / "data" / "gsm8k-train-2000.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in found]
    texts = [{"text": f"{line['question']}{_BORDER} {line['answer']}"} for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "problems.jsonl")
        file.write_text("\n".join(json.dumps(text) for text in texts), encoding="utf-8")
        return load_corpus(DataSpec(train=[str(file)]), TASK)


def parent():
    """The checkpoint's directory."""
    return DATA / "checkpoints" / "novels-llama"


def start():
    """The model before it is finetuned."""
    return lab.original("novels-llama")


@torch.no_grad()
def losses(model, split):
    """For every problem of a split: (nats of the solution's tokens, how many)."""
    found = []
    for document in corpus().documents[split]:
        question = document.text.split(_BORDER)[0]
        first = len(model.processor(question + _BORDER).input_ids)
        ids = torch.tensor([model.processor(document.text).input_ids[:_LONGEST]])
        logits = model.module(input_ids=ids).logits[0, first - 1 : -1]
        loss = cross_entropy(logits, ids[0, first:], reduction="sum")
        found.append((float(loss), len(logits)))
    return found


def more(model):
    """Other measures of quality on held-out problems."""
    return {}
