"""QSD: a spike-driven vision transformer as a model of transformers (arXiv 2501.13492).

Two backbones share their blocks (qsd_layers.py). `vit` has the shape of a ViT: patches, a class
token, positions, equal blocks, so that a ViT can be converted weight by weight (qsd_convert.py).
Its patch projection is a Linear on the pixels of a patch, which is what a convolution as wide as
its stride computes. `stages` is Meta-SpikeFormer (qsd_stages.py). Currents stay float between
blocks (membrane shortcuts); all that a projection or an attention reads is a level of a neuron,
the pixels of the first layer aside. An image is shown `time_steps` times; logits are the mean.

Importing this file registers both classes with AutoConfig, AutoModel and
AutoModelForImageClassification; compressor does it when it reads its first config.json.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from compressor.errors import CompressError
from compressor.model.qsd_config import QsdTransformerConfig
from compressor.model.qsd_layers import (
    GAIN,
    Neuron,
    SpikeBlock,
    SpikeNorm,
    edges,
    project,
    project_pixels,
)
from compressor.model.qsd_stages import Fired, Stem, attention_blocks, early_blocks


class Patches(nn.Module):
    """Pixels [B, channels, height, width] -> currents [B, 1 + N, C] of class token and patches."""

    def __init__(self, config: QsdTransformerConfig) -> None:
        super().__init__()
        (high, wide), (self.high, self.wide) = edges(config)
        self.config, tokens = config, (high // self.high) * (wide // self.wide)
        pixels = config.num_channels * self.high * self.wide
        self.projection = nn.Linear(pixels, config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, tokens + 1, config.hidden_size))

    def forward(self, pixels: Tensor) -> Tensor:
        cut = pixels.unflatten(3, (-1, self.wide)).unflatten(2, (-1, self.high))
        patches_BNI = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = project_pixels(self.projection, patches_BNI, self.config.input_step)
        first = self.cls_token.expand(x.shape[0], -1, -1)
        return torch.cat([first, x], dim=1) + self.position_embeddings


class QsdPreTrainedModel(PreTrainedModel):
    """What both classes share."""

    config_class = QsdTransformerConfig
    base_model_prefix = "qsd"
    main_input_name = "pixel_values"

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, SpikeNorm):
            initialization.constant_(module.weight, GAIN)
            initialization.zeros_(module.bias)
            initialization.zeros_(module.running_mean)
            initialization.ones_(module.running_var)
        elif isinstance(module, nn.Linear):  # norms follow: only directions matter
            initialization.trunc_normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, Patches):
            for table in (module.cls_token, module.position_embeddings):
                initialization.trunc_normal_(table, std=self.config.initializer_range)


class QsdTransformerModel(QsdPreTrainedModel):
    """pixel_values float32 [B, channels, height, width] -> last_hidden_state [T * B, N, C].

    Raises:
        CompressError: images of another size or number of channels than the config's.
    """

    def __init__(self, config: QsdTransformerConfig) -> None:
        super().__init__(config)
        if config.backbone == "vit":
            self.embeddings = Patches(config)
            self.layers = nn.ModuleList(
                SpikeBlock(config.hidden_size, config.intermediate_size, config)
                for _ in range(config.num_hidden_layers)
            )
        else:
            self.embeddings, self.layers = Stem(config), attention_blocks(config)
            third, fourth = (config.widths or [])[2:]
            self.widening = Fired(config, third, fourth, 3)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        self._refuse_other_images(pixel_values)
        x = self.embeddings(pixel_values)
        if self.config.backbone == "stages":
            return BaseModelOutput(last_hidden_state=self._two_stages(x))
        x = x.repeat(self.config.time_steps, 1, 1)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x)

    def _two_stages(self, x: Tensor) -> Tensor:
        """Attention stages over [T * B, height, width, C3]; tokens [T * B, N, C4]."""
        shape, early = x.shape[1:3], early_blocks(self.config)
        x = x.flatten(1, 2)
        for index, layer in enumerate(self.layers):
            if index == early:
                x = self.widening(x.unflatten(1, shape)).flatten(1, 2)
            x = layer(x)
        return x

    def _refuse_other_images(self, pixels: Tensor) -> None:
        wanted = (self.config.num_channels, *edges(self.config)[0])
        if tuple(pixels.shape[1:]) != wanted:
            given, own = (" x ".join(map(str, shape)) for shape in (pixels.shape[1:], wanted))
            raise CompressError(
                f"images of {given} (channels, height, width); the model reads {own}",
                "resize them, or convert a model with that image_size",
            )


class QsdTransformerForImageClassification(QsdPreTrainedModel):
    """A backbone, and a head that reads neurons of its class token, or of the mean of its tokens.

    logits are float32 [B, classes].
    """

    def __init__(self, config: QsdTransformerConfig) -> None:
        super().__init__(config)
        self.qsd = QsdTransformerModel(config)
        classes = int(config.num_labels or 0)
        self.neuron = Neuron(config.hidden_size, classes, config)
        self.classifier = nn.Linear(config.hidden_size, classes)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        x = self.qsd(pixel_values).last_hidden_state
        whole = self.config.backbone == "stages"
        levels = self.neuron(x.mean(dim=1) if whole else x[:, 0])
        read = project(self.classifier, levels, self.config)
        logits = read.unflatten(0, (self.config.time_steps, -1)).mean(dim=0)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(QsdTransformerConfig.model_type, QsdTransformerConfig)
AutoModel.register(QsdTransformerConfig, QsdTransformerModel)
AutoModelForImageClassification.register(QsdTransformerConfig, QsdTransformerForImageClassification)
CLASSES = {cls.__name__: cls for cls in (QsdTransformerModel, QsdTransformerForImageClassification)}
