"""The parts of a spike-driven transformer: norms, neurons, sums over spikes, attention, blocks.

    neuron      l = fire(gain * x + shift)             numerics/spikes.py, gain and shift a channel
    projection  y = (W l) / D + b
    attention   x = Q (K^T V) s / D^3                  Q, K, V levels [B, H, N, d]; no softmax

Every neuron has a batch norm in front. It is a line for every channel, so it folds exactly: a
neuron that compares x with D thresholds a channel, (l - 1/2 - D shift) / (D gain), needs neither
the norm nor the product. A norm in training mode uses the statistics of the batch where gradients
are recorded, and moves its own; the training loop puts norms, and nothing else, into that mode.
Under torchrun each process normalizes by its own rows, and the statistics kept are the leader's.

A quantized projection sums codes over levels, integers both, before it multiplies by its scales:
the sum is exact in any order and in every engine. Unrolled, the same sum is taken over D binary
passes. In attention one operand is unrolled at a time: K while V keeps its integers, then Q while
K^T V keeps them. Step by step, sum_d q_d (k_d^T v_d) would be something else.

Legend: B rows times time steps, N tokens, C channels, H heads, d channels of a head, I inputs,
O outputs, T time steps, D levels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, linear

from compressor.numerics.spikes import integrate_and_fire, unroll

GAIN = (
    0.5  # of a new norm: most potentials lie within (-1, 1), and a third of a neuron's steps fire
)
SCALE = 0.125  # of attention, as in SDT-V2; the norm of the neuron behind it makes up for any other
MOMENTUM = 0.1  # with which a norm follows the batches


def edges(config: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of an image and of a patch."""
    sizes = (config.image_size, config.patch_size)
    image, patch = ((s, s) if isinstance(s, int) else (s[0], s[1]) for s in sizes)
    return image, patch


class SpikeNorm(nn.Module):
    """Batch norm over the last axis: float32 [..., C] -> [..., C]."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps, self.momentum = eps, MOMENTUM
        self.weight, self.bias = (
            nn.Parameter(torch.full((channels,), GAIN)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            gain_C, shift_C = self.line()
            return x * gain_C + shift_C
        flat = x.flatten(0, -2).float()
        own = (self.running_mean, self.running_var, self.weight, self.bias)
        return batch_norm(flat, *own, True, self.momentum, self.eps).view(x.shape)

    def line(self) -> tuple[Tensor, Tensor]:
        """(gain, shift) of every channel, as its own statistics make them."""
        gain_C = self.weight * (self.running_var + self.eps).rsqrt()
        return gain_C, self.bias - self.running_mean * gain_C


def norms_of(module: nn.Module) -> list[SpikeNorm]:
    """The norms that are not folded yet."""
    return [m for m in module.modules() if isinstance(m, SpikeNorm)]


class Line(nn.Module):
    """What a norm becomes when it is folded into the neuron behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain, self.shift = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.shift


class Neuron(nn.Module):
    """A norm and the neurons behind it: float32 [T * B, N, C] -> levels of the same shape.

    Attributes:
        fan_out: additions that one spike causes in what reads it.
    """

    def __init__(self, channels: int, fan_out: int, config: Any) -> None:
        super().__init__()
        self.fan_out = fan_out
        self.levels, self.decay, self.time_steps = config.levels, config.decay, config.time_steps
        self.norm = Line(channels) if config.folded else SpikeNorm(channels, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        steps = u.unflatten(0, (self.time_steps, -1))
        return integrate_and_fire(steps, self.levels, self.decay).flatten(0, 1)

    def fold(self) -> None:
        """Put the line of the norm in its place."""
        assert isinstance(self.norm, SpikeNorm)
        line = Line(len(self.norm.weight))
        with torch.no_grad():
            for own, value in zip((line.gain, line.shift), self.norm.line(), strict=True):
                own.copy_(value)
        self.norm = line


def binary_passes(levels_X: Tensor, config: Any) -> Tensor:
    """[passes, ...]: what is summed over to use levels; D binary passes, or one with integers."""
    return unroll(levels_X, config.levels) if config.unrolled else levels_X.unsqueeze(0)


def project(layer: Any, levels: Tensor, config: Any) -> Tensor:
    """(W l) / D + b of a Linear, or of whatever has taken its place."""
    return _scaled(layer, binary_passes(levels, config), 1 / (config.levels or 1))


def project_pixels(layer: Any, pixels: Tensor, step: float | None) -> Tensor:
    """W x + b of what is no spike, rounded to a grid of 8 bits where there is one."""
    codes, factor = on_grid(pixels, step)
    return _scaled(layer, codes.unsqueeze(0), factor)


def on_grid(pixels: Tensor, step: float | None) -> tuple[Tensor, float]:
    """(signed 8-bit codes as float32, their step); pixels themselves and 1 without a grid."""
    if step is None:
        return pixels, 1.0
    return (pixels * (1 / step)).round().clamp(-127, 127), step


def _scaled(layer: Any, passes: Tensor, factor: float) -> Tensor:
    if isinstance(layer, nn.Linear):
        return scaled_sum(linear(passes, layer.weight), None, factor, layer.bias)
    return scaled_sum(layer.integer_sums(passes), layer.scale_O, factor, layer.bias)


def scaled_sum(
    sums: Tensor, scale_O: Tensor | None, factor: float, bias_O: Tensor | None
) -> Tensor:
    """Sums [passes, ..., O] added up, then scaled: those of codes and levels are exact."""
    y = sums.sum(dim=0) * (factor if scale_O is None else scale_O * factor)
    return y if bias_O is None else y + bias_O


def spike_attention(q: Tensor, k: Tensor, v: Tensor, config: Any) -> Tensor:
    """Attention without softmax over levels [B, H, N, d], linear in tokens; float32."""
    kv = (binary_passes(k, config).transpose(-1, -2) @ v).sum(dim=0)
    x = (binary_passes(q, config) @ kv).sum(dim=0)
    return x * (SCALE / (config.levels or 1) ** 3)


class SpikeAttention(nn.Module):
    """q, k, v and output projections with their neurons: levels [B, N, C] -> current [B, N, C]."""

    def __init__(self, hidden: int, config: Any) -> None:
        super().__init__()
        self.config, self.heads = config, config.num_attention_heads
        width = self.heads * config.head_dim if config.backbone == "vit" else hidden
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(hidden, width, bias=config.qkv_bias) for _ in range(3)
        )
        head_dim = width // self.heads  # a spike of K adds a row of V, one of Q a row of K^T V
        self.q_neuron, self.k_neuron = (Neuron(width, head_dim, config) for _ in range(2))
        self.v_neuron = Neuron(width, 0, config)
        self.out_neuron, self.o_proj = Neuron(width, hidden, config), nn.Linear(width, hidden)

    def forward(self, levels: Tensor) -> Tensor:
        parts = (
            (self.q_proj, self.q_neuron),
            (self.k_proj, self.k_neuron),
            (self.v_proj, self.v_neuron),
        )
        q, k, v = (
            neuron(project(layer, levels, self.config))
            .unflatten(-1, (self.heads, -1))
            .transpose(1, 2)
            for layer, neuron in parts
        )
        x = spike_attention(q, k, v, self.config).transpose(1, 2).flatten(-2)
        return project(self.o_proj, self.out_neuron(x), self.config)


class SpikeMLP(nn.Module):
    """Two projections with a neuron between: levels [B, N, C] -> current [B, N, C]."""

    def __init__(self, hidden: int, inner: int, config: Any) -> None:
        super().__init__()
        self.config = config
        self.fc1, self.fc2 = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.neuron = Neuron(inner, hidden, config)

    def forward(self, levels: Tensor) -> Tensor:
        return project(self.fc2, self.neuron(project(self.fc1, levels, self.config)), self.config)


class SpikeBlock(nn.Module):
    """Attention and MLP, each on a membrane shortcut: float32 [B, N, C] -> [B, N, C]."""

    def __init__(self, hidden: int, inner: int, config: Any) -> None:
        super().__init__()
        self.attention = SpikeAttention(hidden, config)
        self.neuron_before = Neuron(hidden, 3 * self.attention.q_proj.out_features, config)
        self.neuron_after = Neuron(hidden, inner, config)
        self.mlp = SpikeMLP(hidden, inner, config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.neuron_before(x))
        return x + self.mlp(self.neuron_after(x))
