"""A vision transformer becomes a spike-driven one, weight by weight.

    patches, class token, positions, q, k, v, output, both MLP layers, head: the same numbers
    LayerNorm before attention, MLP and head    ->  the batch norm of the neuron that stands there
    GELU and the inputs of attention            ->  a neuron with a batch norm of its own
    softmax(Q K^T / sqrt d) V                   ->  Q (K^T V), without softmax

A LayerNorm's gain and shift go over, times GAIN: neurons have levels in (0, 1). What batch norms
subtract and divide by comes from images (`settle`). The result answers at first like a network
that was never trained; the weights are a start for training.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from compressor.model.families import find_family
from compressor.model.model import Model

_SAME = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
_BLOCK = (*_SAME, "mlp.fc1", "mlp.fc2")
_NORMS = {"layernorm_before": "neuron_before", "layernorm_after": "neuron_after"}


def make_spiking(model: Model, time_steps: int, levels: int, unrolled: bool) -> None:
    """Replace the float ViT or float spike-driven transformer of `model`, in place.

    Norms have no statistics yet where a ViT is converted; see `settle`.
    """
    from compressor.model.qsd_modeling import QsdTransformerForImageClassification

    old: Any = model.module
    config = _config(old.config)
    config.time_steps, config.levels, config.unrolled = time_steps, levels, unrolled
    module = QsdTransformerForImageClassification(config).eval()
    with torch.no_grad():
        if old.config.model_type == config.model_type:
            module.load_state_dict(old.state_dict())
        else:
            _copy_vit(old, module)
    model.module, model.family = module, find_family(config.model_type)


def _config(old: Any) -> Any:
    from compressor.model.qsd_config import QsdTransformerConfig

    given = old.to_dict()
    if old.model_type == QsdTransformerConfig.model_type:
        return QsdTransformerConfig(**given)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    keys += ("image_size", "patch_size", "num_channels", "qkv_bias", "id2label", "label2id")
    head_dim = getattr(old, "head_dim", None)
    return QsdTransformerConfig(**{key: given[key] for key in keys}, head_dim=head_dim)


def _copy_vit(old: Any, new: Any) -> None:
    from compressor.model.qsd_layers import GAIN

    def copy(target: nn.Module, source: nn.Module) -> None:
        for own, given in zip(target.parameters(), source.parameters(), strict=True):
            own.copy_(given.reshape(own.shape))

    def copy_norm(neuron: Any, source: Any) -> None:
        neuron.norm.weight.copy_(source.weight * GAIN)
        neuron.norm.bias.copy_(source.bias * GAIN)

    start, patches = old.vit.embeddings, new.qsd.embeddings
    copy(patches.projection, start.patch_embeddings.projection)
    patches.cls_token.copy_(start.cls_token)
    patches.position_embeddings.copy_(start.position_embeddings)
    for block, source in zip(new.qsd.layers, old.vit.layers, strict=True):
        for path in _BLOCK:
            copy(block.get_submodule(path), source.get_submodule(path))
        for path, neuron in _NORMS.items():
            copy_norm(block.get_submodule(neuron), source.get_submodule(path))
    copy_norm(new.neuron, old.vit.layernorm)
    copy(new.classifier, old.classifier)


def settle(model: Model, batches: Iterable[dict[str, Tensor]]) -> None:
    """Give norms the mean statistics of some images, and pixels their grid, before training."""
    from compressor.model.qsd_layers import MOMENTUM, norms_of

    norms = norms_of(model.module)
    device = next(model.module.parameters()).device
    largest = 0.0
    for norm in norms:
        norm.train()
    for number, batch in enumerate(batches, start=1):
        pixels = batch["pixel_values"].to(device)
        largest = max(largest, float(pixels.abs().max()))
        for norm in norms:
            norm.momentum = 1 / number
        with torch.enable_grad():  # norms use the statistics of a batch only then
            model.module(pixel_values=pixels)
    for norm in norms:
        norm.momentum = MOMENTUM
        norm.eval()
    model.config.input_step = (largest or 1.0) / 127


def fold(model: Model) -> None:
    """Put every norm into its neuron, as numbers that survive the dtype they are stored in."""
    from compressor.model.qsd_layers import Neuron

    dtype = getattr(torch, model.source_dtype)
    with torch.no_grad():
        for module in model.module.modules():
            if isinstance(module, Neuron):
                module.fold()
        for parameter in model.module.parameters():
            parameter.copy_(parameter.to(dtype).float())
    model.config.folded = True
