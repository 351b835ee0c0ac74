"""Quantized distillation and differentiable quantization on images, as in the paper?

A convolutional teacher, or a ViT, and a student of a tenth of its size learn the 10,000 images of
MNIST's test set: 8,000 to train on, 1,000 for rates and 1,000 held out; 400 steps, a ViT 1,200. As
in arXiv 1802.05668, PM rounds the distilled student, with one scale a tensor or one every 256
weights; QD goes on training it behind its grid, DQ moves the points of its codebooks, to which
weights are assigned anew after every step or, held, never. The loss is 0.7 T^2 KL + 0.3 CE with
T = 2. Biases and positions stay float. Sizes are by the paper's formula; Huffman is the mean
code length over all tensors. Trained arms take the same steps and a grid of three rates each, which
grows where its best is at an end; the best on validation images with seed 0 is run with the other
seeds. The paper trains QD from scratch; here all arms start from the student that was distilled in
float, and that student distilled on for those steps is the fair bound. At most a minute a cell.
"""

import tempfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from cells import DATA, table
from sweep import NOT_RUN, best_rate, key, mean, shown, sweep
from torch import nn
from torch.nn.functional import max_pool2d, relu
from transformers import ViTConfig, ViTForImageClassification

from compressor.numerics.buckets import Buckets, even_points, scaled, stored
from compressor.numerics.coding import coded_bytes, huffman_bits, pooled
from compressor.numerics.projected_codebook import Codebook
from compressor.numerics.projection import matrix
from compressor.quantize.differentiable import Learned
from compressor.quantize.points import mean_gap, sort_points, start_points
from compressor.screen import Silent
from compressor.training.idx import idx_pixels, read_idx
from compressor.training.loop import train
from compressor.training.losses import divergence, label_loss
from compressor.training.options import Train
from compressor.training.projected import Projected, projected
from compressor.training.workbench import Workbench

TITLE = "Quantized students of image classifiers"
CNN, VIT = MODELS = ("MNIST", "MNIST, ViT")
SPLITS = {"train": slice(0, 8000), "validation": slice(8000, 9000), "heldout": slice(9000, 10000)}
STEPS, BATCH, BUCKET = {CNN: 400, VIT: 1200}, 64, 256
BITS = (2, 4, 8)
WIDTHS = {
    CNN: {"teacher": (16, 32, 128), "student": (4, 8, 32)},
    VIT: {"teacher": (64, 3), "student": (24, 2)},
}
ROUNDED = ("PM, no buckets", "PM")
FLOAT, BOUND = ("teacher", "alone", "distilled"), "student distilled on"
LRS, POINT_LRS = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)  # of points: in mean gaps between them
RATES = {"QD": LRS, "DQ": POINT_LRS, "DQ, held": POINT_LRS}


class Net(nn.Module):
    """Two convolutions with pooling, two dense layers: pixels [B, 1, 28, 28] -> logits [B, 10]."""

    def __init__(self, first, second, dense):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, first, 5), nn.Conv2d(first, second, 5)
        self.dense, self.out = nn.Linear(16 * second, dense), nn.Linear(dense, 10)

    def forward(self, x):
        x = max_pool2d(relu(self.first(x)), 2)
        x = max_pool2d(relu(self.second(x)), 2)
        return self.out(relu(self.dense(x.flatten(1))))


class Transformer(nn.Module):
    """A ViT of patches of 7 x 7: pixels [B, 1, 28, 28] -> logits [B, 10]."""

    def __init__(self, width, layers):
        super().__init__()
        config = ViTConfig(
            **{"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10},
            **{"hidden_size": width, "intermediate_size": 2 * width, "initializer_range": 0.1},
            **{"num_hidden_layers": layers, "num_attention_heads": 4},
        )
        self.vit = ViTForImageClassification(config).eval()

    def forward(self, x):
        return self.vit(pixel_values=x).logits


NETS = {CNN: Net, VIT: Transformer}


class Loss(nn.Module):
    """0.7 T^2 KL + 0.3 CE, a mean over rows; CE alone without a teacher."""

    def __init__(self, student, teacher=None):
        super().__init__()
        self.models, self.kl = (student, teacher), divergence("forward", 2.0)  # not ours

    def forward(self, batch):
        student, teacher = self.models
        logits = student(batch["pixel_values"])
        ce = label_loss(logits, batch["labels"]).mean()
        if teacher is None:
            return ce
        with torch.no_grad():
            above = teacher(batch["pixel_values"])
        return 0.7 * self.kl(logits, above).mean() + 0.3 * ce


@cache
def images():
    """(pixels [N, 1, 28, 28], labels [N])."""
    file = DATA / "data" / "t10k-images-idx3-ubyte.gz"
    pixels = torch.from_numpy(idx_pixels(file).astype(np.float32) / 255).unsqueeze(1)
    return pixels, torch.tensor([document.label for document in read_idx(file)])


def batches(seed, steps):
    """Batches of the training split, drawn anew every epoch."""
    pixels, labels = (x[SPLITS["train"]] for x in images())
    draw, found = torch.Generator().manual_seed(seed), []
    while len(found) < steps:
        rows = torch.randperm(len(labels), generator=draw).split(BATCH)
        found += [{"pixel_values": pixels[r], "labels": labels[r]} for r in rows if len(r) == BATCH]
    return found[:steps]


@torch.no_grad()
def errors(net):
    """Shares of wrong answers, by split."""
    found = {}
    for split in ("validation", "heldout"):
        pixels, labels = (x[SPLITS[split]] for x in images())
        found[split] = float((net(pixels).argmax(1) != labels).float().mean())
    return found


def learn(net, objective, seed, lr, optimizer=None, after_step=None):
    """Train in place."""
    steps = STEPS[VIT if isinstance(net, Transformer) else CNN]
    options = Train(
        **{"steps": steps, "batch": BATCH, "lr": lr, "precision": "float32"},
        **{"snapshot_seconds": 1e6},
    )
    with tempfile.TemporaryDirectory() as scratch:
        surroundings = (seed, torch.device("cpu"), Path(scratch), Silent(), lambda line: None)
        work = Workbench(*surroundings, _batches=None, _teacher=None, _reference=None)
        train(net, batches(seed, steps), objective, options, work, optimizer, after_step)


@cache
def trained(model, kind, seed):
    """The teacher, the student without one, or the student that learned from the teacher."""
    torch.manual_seed(seed)
    net = NETS[model](*WIDTHS[model]["teacher" if kind == "teacher" else "student"])
    teacher = trained(model, "teacher", seed) if kind == "distilled" else None
    learn(net, Loss(net, teacher), seed, 3e-3)
    return net.requires_grad_(False)


def float_cell(model, kind, seed):
    """A float network."""
    net = trained(model, kind, seed)
    count = sum(p.numel() for p in net.parameters())
    return {"bytes": 4 * count, **errors(net)}


def student(model, seed):
    """A copy of the student that was distilled in float, to be trained."""
    net = NETS[model](*WIDTHS[model]["student"])
    net.load_state_dict(trained(model, "distilled", seed).state_dict())
    return net


def bound(model, seed, lr):
    """The student distilled on in float."""
    net = student(model, seed)
    learn(net, Loss(net, trained(model, "teacher", seed)), seed, lr)
    return errors(net) | {"lr": lr, "bytes": 4 * sum(p.numel() for p in net.parameters())}


def cell(model, arm, bits, seed, lr=None):
    """A quantized student: errors and sizes."""
    net = student(model, seed)
    buckets = Buckets(None if arm == "PM, no buckets" else BUCKET, True, "linear")
    users = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    layers = [((m,), _codebook(m.weight.detach(), buckets, bits, "DQ" in arm)) for m in users]
    loss = Loss(net, trained(model, "teacher", seed))
    if arm == "QD":
        learn(net, Projected(loss, layers), seed, lr)
    elif arm not in ROUNDED:
        net.requires_grad_(False)
        for (user,), book in layers if arm == "DQ, held" else ():
            book.hold(user.weight)
        learned = Learned(loss, layers)
        groups = [{"params": [p], "lr": lr * mean_gap(p)} for p in learned.points]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
        after_step = partial(_sort, learned, optimizer) if arm == "DQ" else None
        learn(net, learned, seed, lr, optimizer, after_step)
    with projected(layers):
        found = errors(net)
    return found | {"lr": lr} | _sizes(net, layers, bits)


def _sort(learned, optimizer, step):
    sort_points(learned.points, optimizer)


def _codebook(weight, buckets, bits, learns):
    if not learns:
        return Codebook(buckets, even_points(bits, "linear"))
    w_Bg = buckets.cut(matrix(weight))
    v_Bg = scaled(w_Bg, *stored(*buckets.scales(w_Bg)))
    return Codebook(buckets, start_points(v_Bg, 2**bits, "quantiles", False, False), learns=True)


def _sizes(net, layers, bits):
    parts = [book.parts(user.weight) for (user,), book in layers]
    codes = [part["codes_OI"] for part in parts]
    weights, scales = sum(c.numel() for c in codes), sum(part["scale"].numel() for part in parts)
    floats, huffman = (
        sum(p.numel() for p in net.parameters()) - weights,
        huffman_bits(pooled(codes)),
    )
    plain, coded = (coded_bytes(floats, n, scales) for n in (bits * weights, huffman))
    return {"bytes": plain, "huffman_bytes": coded, "huffman_bits": huffman / weights}


def prefix(model, arm, bits):
    name = "vision" if model == CNN else "vision ViT"
    return f"{name} {arm} {bits} bits" if bits else f"{name} {arm}"


def run(cells, model, seeds):
    """Float networks, then every arm, the fewest bits first."""
    for kind in FLOAT:
        for seed in seeds:
            name = f"{prefix(model, kind, None)} seed {seed}"
            cells.run(name, partial(float_cell, model, kind, seed))
    sweep(cells, prefix(model, BOUND, None), partial(bound, model), seeds, LRS, grows=True)
    for bits in BITS:
        for arm in ROUNDED:
            for seed in seeds:
                name = f"{prefix(model, arm, bits)} seed {seed}"
                cells.run(name, partial(cell, model, arm, bits, seed))
        for arm, rates in RATES.items():
            make = partial(cell, model, arm, bits)
            sweep(cells, prefix(model, arm, bits), make, seeds, rates, grows=True)


def section(cells):
    """A table for each kind of network, a row for every arm: means over seeds."""
    header = ["network", "bits", "rate", "validation %", "held out %", "over seeds", "seeds"]
    blocks = []
    for model, title in ((CNN, "Convolutional networks"), (VIT, "ViTs")):
        rows = [_row(cells, model, kind, None) for kind in (*FLOAT, BOUND)]
        rows += [_row(cells, model, arm, bits) for bits in BITS for arm in (*ROUNDED, *RATES)]
        blocks += [f"### {title}", table([*header, "bytes", "with Huffman"], rows)]
    return blocks


def _row(cells, model, arm, bits):
    names = {"alone": "student alone", "distilled": "student distilled"}
    name, rate = prefix(model, arm, bits), None
    if arm in RATES or arm == BOUND:
        rate = best_rate(cells, name)
        found = [cells.found.get(key(name, rate, seed)) for seed in range(10)] if rate else []
    else:
        found = [cells.found.get(f"{name} seed {seed}") for seed in range(10)]
    found = [cell for cell in found if cell]
    start = [names.get(arm, arm), str(bits or 32), f"{rate:g}" if rate else ""]
    if not found:
        return [*start, *[NOT_RUN] * 6]
    right = {s: [100 * (1 - c[s]) for c in found] for s in ("validation", "heldout")}
    sizes = [[c[k] for c in found if k in c] for k in ("bytes", "huffman_bytes")]
    shares = [f"{mean(right['validation']):.1f}", *shown(right["heldout"], 1)]
    return [*start, *shares, *(f"{mean(s):.0f}" if s else "" for s in sizes)]
