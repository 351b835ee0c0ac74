"""What the experiments with Minitron share: text, students, training, loss and tables.

Everything trains on compressor's own path: prune.minitron or a random start, an objective of
distill, the loop of training/, a workbench. Arms of an experiment see the same batches.
"""

import copy
import dataclasses
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from cells import DATA

from compressor.distill import ce, kd
from compressor.distill.runner import run as train
from compressor.model.checkpoint import load_directory
from compressor.model.model import Model
from compressor.prune import minitron
from compressor.screen import Silent
from compressor.training.data import DataSpec, load_corpus, make_batches
from compressor.training.options import Train
from compressor.training.reading import TEXT
from compressor.training.workbench import Workbench

WHOLE = ", whole stories"  # the text as the model read it when it was trained
STORIES = f"stories260K{WHOLE}"
MARKER = "<|endoftext|>"  # between stories in the file; the model does not know it
MODELS = {
    "stories260K": {"train": "data/tinystories.txt"},
    STORIES: {"train": "data/tinystories.txt"},
    "novels-llama": {
        "train": "data/novels.txt",
        "heldout": "checkpoints/novels-llama/heldout-novels.txt",
    },
}
LENGTH, BATCH, CALIBRATION, ROWS = 128, 8, 256, 512  # tokens of a row; rows
OBJECTIVES = {
    "KL": lambda train: (kd, kd.Options(train=train)),
    "CE": lambda train: (ce, ce.Options(train=train)),
    "CE + KL": lambda train: (kd, kd.Options(train=train, ce=0.5)),
}


@cache
def corpus(name):
    """The text of a model, split."""
    files = {k: DATA / v for k, v in MODELS[name].items()}
    with tempfile.TemporaryDirectory() as folder:
        if name in (STORIES, "stories260K"):
            copy_of = whole_stories if name == STORIES else markers_as_words
            files = {k: copy_of(v, Path(folder, v.name)) for k, v in files.items()}
        return load_corpus(DataSpec(**{k: [str(v)] for k, v in files.items()}), "causal-lm")


def whole_stories(source, target):
    """A copy of a text in which a story is one document, without the markers between stories."""
    stories = source.read_text(encoding="utf-8").split(MARKER)
    lines = ["\n".join(x for x in story.splitlines() if x.strip()) for story in stories]
    target.write_text("\n\n".join(x for x in lines if x), encoding="utf-8")
    return target


def markers_as_words(source, target):
    """A copy of a text in which no marker has a line of its own, where it would end a document."""
    text = source.read_text(encoding="utf-8")
    target.write_text(text.replace(f"{MARKER}\n", f"{MARKER} "), encoding="utf-8")
    return target


def original(name):
    """The checkpoint as it is."""
    return load_directory(DATA / "checkpoints" / name.removesuffix(WHOLE))


def workbench(name, seed, calibration="calibration"):
    """The surroundings of a stage on a model's own text; the original is the teacher."""
    return surroundings(corpus(name), lambda: original(name), seed, "causal-lm", calibration)


@contextmanager
def surroundings(text, teacher, seed, task, calibration="calibration", reading=TEXT):
    """A workbench with a scratch of its own, batches and a teacher.

    The seed draws the rows of train; `calibration` names the split that calibration rows are of.
    """
    own = {"task": task, "seed": seed, "reading": reading}
    processor = teacher().processor

    def batches(split, n, **shape):
        split = calibration if split == "calibration" else split
        return make_batches(text, processor, split, n, **shape | own)

    with tempfile.TemporaryDirectory() as scratch:
        yield Workbench(
            *(seed, torch.device("cpu"), Path(scratch), Silent(), lambda line: None),
            **{"_batches": batches, "_teacher": teacher, "_reference": None},
        )


def kept(name, make):
    """A folder in the temporary folder that `make(folder)` fills; one that is there stays."""
    folder = Path(tempfile.gettempdir(), f"compress-benchmark-{name}")
    if not folder.is_dir():
        partial = Path(tempfile.mkdtemp())
        make(partial)
        partial.rename(folder)
    return folder


@cache
def rows(name, split):
    """Rows of `validation` or `heldout`, at most ROWS."""
    with workbench(name, 0) as work:
        return list(work.batches(split, ROWS // 8, batch=8, length=LENGTH))


@torch.no_grad()
def loss(model, batches):
    """Nats per token, windows of LENGTH tokens, the first token of a window not scored."""
    total = sum(model.module(input_ids=b["input_ids"], labels=b["input_ids"]).loss for b in batches)
    return float(total) / len(batches)


def copy_of(model):
    """The same model again, to be changed."""
    return dataclasses.replace(
        model, module=copy.deepcopy(model.module), formats=dict(model.formats), notes={}
    )


def pruned(name, seed, **options):
    """The checkpoint after prune.minitron; the seed draws the calibration rows from train."""
    model = original(name)
    options = minitron.Options(samples=CALIBRATION, length=LENGTH, **options)
    with workbench(name, seed, calibration="train") as work:
        minitron.run(model, options, work)
    return model


def random_start(model, seed):
    """A model of the same shape with fresh weights."""
    torch.manual_seed(seed)
    module = type(model.module)(copy.deepcopy(model.config)).eval()
    return Model(module, model.family, model.processor)


def parameters(model):
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.module.parameters())


def trained(name, student, objective, seed, steps, lr, length=LENGTH):
    """Train `student` in place; its loss on both held-out splits, and what it took."""
    options = Train(
        **{"steps": steps, "batch": BATCH, "length": length, "lr": lr},
        **{"precision": "float32", "snapshot_seconds": 1e6},
    )
    method, options = OBJECTIVES[objective](options)
    teacher = original(name)
    teacher.module.requires_grad_(False)
    with workbench(name, seed) as work:
        facts = train(student, method.objective(options, student, teacher), options, work)
    return {
        **{split: loss(student, rows(name, split)) for split in ("validation", "heldout")},
        **{"tokens": facts["tokens"], "train_seconds": facts["seconds"]},
        "parameters": parameters(student),
    }
