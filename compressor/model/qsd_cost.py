"""What a spike-driven transformer does for one image: spikes, additions, products, energy.

    AC  = sum over neurons of spikes x fan-out      one addition for every spike and every reader
    MAC = products of the first layer, whose inputs are pixels
    E   = 4.6 pJ MAC + 0.9 pJ AC                    45 nm; spikes are those of all T x D steps

which is sum_l T D rate_l FLOPs_l of the paper, counted spike by spike. A spike at the border of a
convolution counts as many readers as any other, which is too many: 30 per cent in all convolutions
of a small four-stage network on 32 pixels. A float network of the same
sizes does all of it in MACs; those of q k^T v, which has a softmax, are counted, the softmax, the
norms and the activation function are not. Energy is not scaled by the bits of weights: that the
paper does so could not be verified.

`entropy` is that of the levels of q, k and v over all images, in bits (numerics/spikes.py): the
information that a
neuron passes on, for which QSD trains levels instead of spikes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compressor.model.model import Model
from compressor.model.qsd_layers import Neuron, edges
from compressor.numerics.spikes import entropy, level_counts

MAC_PJ, AC_PJ = 4.6, 0.9  # of one operation on float32 at 45 nm
KINDS = ("q", "k", "v")
FORMULA = f"E = {MAC_PJ} pJ x MAC + {AC_PJ} pJ x AC"


@torch.no_grad()
def spike_cost(model: Model, batches: Iterable[dict[str, Tensor]]) -> dict[str, Any]:
    """Means for one image: {firing_rate, ac, mac, energy_nj, float_mac, entropy, layers, formula}.

    firing_rate is the share of all neurons and of their T x D steps that fire; float_mac what the
    same layers take in MACs when no input is a spike; entropy is {q, k, v}, means over blocks;
    layers is {neuron: {firing_rate, ac}}.
    """
    neurons = {name: m for name, m in model.module.named_modules() if isinstance(m, Neuron)}
    top, images = model.config.levels, 0
    fired, places = dict.fromkeys(neurons, 0.0), dict.fromkeys(neurons, 0)
    counts: dict[str, Any] = {}
    device = next(model.module.parameters()).device
    for batch in batches:
        with _levels_kept(neurons) as kept:
            model.module(pixel_values=batch["pixel_values"].to(device))
        images += len(batch["pixel_values"])
        for name, levels in kept.items():
            fired[name] += float(levels.sum())
            places[name] += levels.numel()
            if _kind(name) in KINDS:
                counts[name] = counts.get(name, 0.0) + level_counts(levels.flatten(0, -2), top)
    layers = {
        name: {
            "firing_rate": fired[name] / (places[name] * top),
            "ac": fired[name] * neuron.fan_out / images,
        }
        for name, neuron in neurons.items()
    }
    ac, mac = sum(layer["ac"] for layer in layers.values()), first_layer_products(model.config)
    dense = sum(places[name] * neuron.fan_out for name, neuron in neurons.items())
    return {
        "firing_rate": sum(fired.values()) / (sum(places.values()) * top),
        "ac": ac,
        "mac": mac,
        "energy_nj": (MAC_PJ * mac + AC_PJ * ac) / 1000,
        "float_mac": mac + dense / (images * model.config.time_steps),
        "entropy": {kind: _entropy(counts, kind) for kind in KINDS},
        "layers": layers,
        "formula": FORMULA,
    }


def _kind(neuron: str) -> str:
    """q, k or v, or what else a neuron is called."""
    return neuron.rpartition(".")[2].partition("_")[0]


def _entropy(counts: dict[str, Any], kind: str) -> float:
    """Mean over blocks."""
    found = [entropy(counts_LC) for name, counts_LC in counts.items() if _kind(name) == kind]
    return sum(found) / max(1, len(found))


@contextmanager
def _levels_kept(neurons: dict[str, Neuron]) -> Iterator[dict[str, Tensor]]:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, levels: found.__setitem__(name, levels)

    hooks = [neuron.register_forward_hook(keep(name)) for name, neuron in neurons.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def first_layer_products(config: Any) -> int:
    """Products of the layer that reads pixels, for one image."""
    size, patch = edges(config)
    if getattr(config, "backbone", "vit") == "stages":
        places = -(-size[0] // 2) * -(-size[1] // 2)
        return places * config.num_channels * 7 * 7 * config.widths[0] // 2
    tokens = (size[0] // patch[0]) * (size[1] // patch[1])
    return tokens * config.num_channels * patch[0] * patch[1] * config.hidden_size


def vit_products(config: Any) -> int:
    """MACs of a float ViT with these sizes for one image, softmax attention included."""
    size, patch = edges(config)
    tokens = (size[0] // patch[0]) * (size[1] // patch[1]) + 1
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    block = tokens * (4 * hidden * width + 2 * hidden * inner) + 2 * tokens**2 * width
    head = hidden * config.num_labels
    return first_layer_products(config) + config.num_hidden_layers * block + head
