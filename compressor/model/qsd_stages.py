"""Meta-SpikeFormer, the four-stage backbone of QSD: convolutions first, attention later.

    7x7 s2 to C1/2, block | 3x3 s2 to C1, block | 3x3 s2 to C2, 2 blocks | 3x3 s2 to C3, 3/4 of the
    attention blocks | 3x3 to C4, the other quarter | mean over tokens, neurons, head

A convolution is kept as a matrix [O, I k k], a Linear, so that its codes, scales and formats are
those of every other weight. Activations are [B, height, width, C] in between, B rows times time
steps.

Where we differ from the released network: q, k, v and output of attention are one projection each
instead of three convolutions in a row; neurons also stand between the depthwise and the second
pointwise convolution of a block, so that each of them adds spikes and nothing else; there is no
layer scale.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import conv2d

from compressor.model.qsd_layers import Neuron, SpikeBlock, binary_passes, on_grid, scaled_sum

STRIDE = 16  # of all convolutions together: pixels of a token's edge


class Convolution(nn.Module):
    """A convolution over levels or pixels: float32 [B, H, W, I] -> [B, H / stride, W / stride, O].

    Attributes:
        fan_out: additions that one spike causes, borders aside.
    """

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.size, self.stride, self.groups = size, stride, groups
        self.kernel = nn.Linear(inputs // groups * size**2, outputs)
        self.fan_out = size**2 * outputs // (groups * stride**2)

    def forward(self, passes: Tensor, factor: float) -> Tensor:
        """Sum over `passes` [passes, B, H, W, I], times `factor`, plus bias."""
        layer: Any = self.kernel
        plain = isinstance(layer, nn.Linear)
        matrix = layer.weight if plain else layer.integer_weight()
        weight = matrix.unflatten(1, (-1, self.size, self.size))
        x = passes.flatten(0, 1).permute(0, 3, 1, 2)
        y = conv2d(x, weight, None, self.stride, self.size // 2, groups=self.groups)
        sums = y.permute(0, 2, 3, 1).unflatten(0, (passes.shape[0], -1))
        return scaled_sum(sums, None if plain else layer.scale_O, factor, layer.bias)


class Fired(nn.Module):
    """Neurons and the convolution that reads them: float32 [B, H, W, I] -> [B, H', W', O]."""

    def __init__(
        self, config: Any, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.config = config
        self.convolution = Convolution(inputs, outputs, size, stride, groups)
        self.neuron = Neuron(inputs, self.convolution.fan_out, config)

    def forward(self, x: Tensor) -> Tensor:
        passes = binary_passes(self.neuron(x), self.config)
        return self.convolution(passes, 1 / (self.config.levels or 1))


class ConvBlock(nn.Module):
    """A separable and a wide convolution, each on a membrane shortcut; shapes stay."""

    def __init__(self, width: int, config: Any) -> None:
        super().__init__()
        inner = 2 * width
        self.separable = nn.Sequential(
            Fired(config, width, inner, 1),
            Fired(config, inner, inner, 7, groups=inner),
            Fired(config, inner, width, 1),
        )
        self.wide = nn.Sequential(
            Fired(config, width, 4 * width, 3), Fired(config, 4 * width, width, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.separable(x)
        return x + self.wide(x)


class Stem(nn.Module):
    """The stages of convolutions: pixels [B, channels, H, W] -> currents [T B, H/16, W/16, C3]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        first, second, third, _ = config.widths
        half, self.config = first // 2, config
        self.projection = Convolution(config.num_channels, half, 7, 2)
        self.stages = nn.Sequential(
            ConvBlock(half, config),
            Fired(config, half, first, 3, 2),
            ConvBlock(first, config),
            Fired(config, first, second, 3, 2),
            ConvBlock(second, config),
            ConvBlock(second, config),
            Fired(config, second, third, 3, 2),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        codes, step = on_grid(pixels.permute(0, 2, 3, 1), self.config.input_step)
        x = self.projection(codes.unsqueeze(0), step)
        return self.stages(x.repeat(self.config.time_steps, 1, 1, 1))


def attention_blocks(config: Any) -> nn.ModuleList:
    """The blocks of the third and fourth stage."""
    third, fourth = config.widths[2:]
    early, ratio = early_blocks(config), config.intermediate_size / config.hidden_size
    widths = [third] * early + [fourth] * (config.num_hidden_layers - early)
    return nn.ModuleList(SpikeBlock(width, int(width * ratio), config) for width in widths)


def early_blocks(config: Any) -> int:
    """Attention blocks of the third stage."""
    return config.num_hidden_layers * 3 // 4
