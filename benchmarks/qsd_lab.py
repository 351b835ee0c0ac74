"""What the cells of QSD are made of: images in folds, the small ViT, training, right answers."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from cells import DATA
from lab import kept

from compressor.distill import ce
from compressor.distill.runner import run as train
from compressor.model.checkpoint import load_directory
from compressor.model.families import find_family
from compressor.model.model import Model
from compressor.screen import Silent
from compressor.training.idx import idx_pixels, read_idx
from compressor.training.options import Train
from compressor.training.workbench import Workbench

FOLDS, BATCH, RATE = 5, 64, 2e-3
DEVIATION = 0.1  # of the ViT's first weights: about 1 / sqrt(width), which learns more than 0.02
LONGER = "MNIST, longer"
MNIST = (
    {"image_size": 28, "patch_size": 7, "hidden_size": 64, "num_hidden_layers": 3}
    | {"num_attention_heads": 4, "intermediate_size": 128},
    2500,
)
# {data: (ViT, steps of the ViT, steps of what starts from it)}
SETTINGS = {
    "MNIST": (*MNIST, 800),
    LONGER: (*MNIST, 2500),
    "digits": (
        {"image_size": 8, "patch_size": 2, "hidden_size": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "intermediate_size": 96},
        800,
        400,
    ),
}


@cache
def images(data):
    """(pixels [N, 1, height, width] of [-1, 1], labels [N]), in an order that is drawn once."""
    if data == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        pixels, labels = found.images.astype(np.float32) / 16, found.target
    else:
        file = DATA / "data" / "t10k-images-idx3-ubyte.gz"
        pixels = idx_pixels(file).astype(np.float32) / 255
        labels = np.array([document.label for document in read_idx(file)])
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(pixels[order]).unsqueeze(1) * 2 - 1
    return x, torch.from_numpy(labels[order]).long()


def rows(data, fold):
    """(images to train on, held-out images) of a fold, as indices."""
    held = torch.arange(len(images(data)[1])) % FOLDS == fold
    return torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()


def batches(data, fold):
    """What a workbench gives: batches of the training images, drawn anew every epoch."""
    pixels, labels = images(data)
    own, _ = rows(data, fold)

    def make(split, n, **shape):
        if split != "train":
            return []
        draw, found = torch.Generator().manual_seed(fold), []
        while len(found) < n:
            chosen = own[torch.randperm(len(own), generator=draw)].split(shape["batch"])
            found += [
                {"pixel_values": pixels[i], "labels": labels[i], "row": i}
                for i in chosen
                if len(i) == shape["batch"]
            ]
        return found[:n]

    return make


def options(steps):
    return Train(
        **{"steps": steps, "batch": BATCH, "lr": RATE, "warmup": 50},
        **{"precision": "float32", "snapshot_seconds": 1e6},
    )


def learn(model, data, fold, method, chosen, teacher=None):
    """Train in place: `method` is distill.ce or a quantizer."""
    torch.manual_seed(fold)
    with tempfile.TemporaryDirectory() as scratch:
        surroundings = (fold, torch.device("cpu"), Path(scratch), Silent(), lambda line: None)
        work = Workbench(
            *surroundings,
            **{"_batches": batches(data, fold), "_teacher": lambda: teacher, "_reference": None},
        )
        if method is ce:
            train(model, ce.objective(chosen, model, None), chosen, work)
        else:
            method.run(model, chosen, work)


def vit(data, fold):
    """The ViT of a fold, trained once."""
    shape, steps, _ = SETTINGS[data]

    def make(folder):
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(fold)
        config = ViTConfig(**shape, num_channels=1, num_labels=10, initializer_range=DEVIATION)
        model = Model(ViTForImageClassification(config).eval(), find_family("vit"), None)
        learn(model, data, fold, ce, ce.Options(train=options(steps)))
        model.module.save_pretrained(folder)

    name = data.removesuffix(", longer")  # whose ViT is MNIST's
    model = load_directory(kept(f"qsd-{name}-{fold}-{steps}-{RATE}-{DEVIATION}", make))
    model.module.requires_grad_(False)
    return model


@torch.no_grad()
def right(model, data, fold):
    """Which held-out images are answered rightly, bool [N]."""
    pixels, labels = images(data)
    _, held = rows(data, fold)
    found = [model.module(pixel_values=pixels[i]).logits.argmax(dim=1) for i in held.split(500)]
    return torch.cat(found) == labels[held]


def to_hex(flags):
    """Bools as hexadecimal digits, for a cell."""
    return np.packbits(flags.numpy()).tobytes().hex()


def from_hex(text, count):
    """The first `count` bools of `to_hex`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:count].astype(bool)
