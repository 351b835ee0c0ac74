"""Pico spike-driven transformers of both backbones, and batches of labelled images."""

import dataclasses

import torch

from compressor.model.families import find_family
from compressor.model.model import Model
from compressor.model.qsd_config import QsdTransformerConfig
from compressor.model.qsd_convert import fold, settle
from compressor.model.qsd_modeling import QsdTransformerForImageClassification
from compressor.quantize import qsd, rtn
from compressor.quantize.weights import round_to_nearest
from families import roughen

SHAPES = {
    "vit": {"hidden_size": 32, "image_size": 16, "patch_size": 4, "num_channels": 3},
    "stages": {
        **{"backbone": "stages", "widths": [4, 8, 16, 24], "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "intermediate_size": 48, "image_size": 32, "num_channels": 3},
    },
}


def spiking(backbone="vit", **changes):
    """A float Model whose norms have seen images."""
    config = QsdTransformerConfig(**SHAPES[backbone] | {"num_labels": 5} | changes)
    torch.manual_seed(0)
    module = QsdTransformerForImageClassification(config).eval()
    roughen(module)
    model = Model(module, find_family("qsd_transformer"), None)
    settle(model, [images(model, seed=seed) for seed in range(3)])
    return model


def images(model, rows=6, seed=9):
    """A batch of random images with labels."""
    size, channels = model.config.image_size, model.config.num_channels
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, channels, size, size, generator=draw)
    return {"pixel_values": pixels, "labels": torch.randint(0, 5, (rows,), generator=draw)}


def quantized(backbone="vit", bits=4, **changes):
    """The same, folded and rounded, without training."""
    model = spiking(backbone, **changes)
    fold(model)
    model.module.requires_grad_(False)
    for target in qsd.targets(model, qsd.Options(bits=bits)):
        round_to_nearest(model, target, rtn.Options(bits=4))
    return model


def with_images(work, model):
    """A workbench whose batches are labelled images for `model`."""

    def batches(split, n, **shape):
        first = {"train": 0, "validation": 1000}.get(split, 2000)
        return [
            images(model, shape.get("batch", 4), first + i) for i in range(2 if n is None else n)
        ]

    return dataclasses.replace(work, _batches=batches)
