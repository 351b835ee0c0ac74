"""The config of a quantized spike-driven transformer (see qsd_modeling.py)."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class QsdTransformerConfig(PreTrainedConfig):
    """Sizes and neurons of a spike-driven transformer for images.

    Attributes:
        backbone: vit, a patch projection and equal blocks, or stages, Meta-SpikeFormer's four.
        widths: channels of the four stages; the last is hidden_size. Null for vit.
        num_hidden_layers: attention blocks; of four, stages has three in its third stage.
        patch_size: pixels of a token's edge; 16 for stages, whose convolutions make that.
        time_steps: T, how often an image is shown.
        levels: D of the neurons; null: they do not round (the float counterpart).
        decay: share of a membrane potential that is left at the next time step.
        input_step: grid of the pixels, so that the first layer sums integers too; null: none.
        folded: norms have become two numbers a channel of the neurons they feed.
        unrolled: compute with D binary spikes instead of integers; the answers are the same.
    """

    model_type = "qsd_transformer"

    backbone: str = "vit"
    widths: list[int] | None = None
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    head_dim: int | None = None
    intermediate_size: int = 128
    image_size: int | list[int] | tuple[int, int] = 28
    patch_size: int | list[int] | tuple[int, int] = 7
    num_channels: int = 1
    qkv_bias: bool = True
    time_steps: int = 1
    levels: int | None = 4
    decay: float = 0.5
    input_step: float | None = None
    folded: bool = False
    unrolled: bool = False
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.backbone == "stages" and self.widths:
            self.hidden_size, self.patch_size = self.widths[-1], 16
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_neurons(self) -> None:
        """Refuse numbers that make no network; transformers calls it by its name."""
        if self.time_steps < 1 or (self.levels is not None and self.levels < 1):
            raise ValueError(f"time_steps {self.time_steps} and levels {self.levels}: at least 1")
        if self.unrolled and self.levels is None:
            raise ValueError("unrolled needs levels: what does not round has no binary spikes")
        if self.backbone not in ("vit", "stages"):
            raise ValueError(f"backbone '{self.backbone}': vit or stages")
        if self.backbone == "stages":
            widths, heads = self.widths or [], self.num_attention_heads
            if len(widths) != 4 or widths[0] % 2 or any(width % heads for width in widths[2:]):
                raise ValueError(
                    f"widths {widths}: four, the first even, the last two divided by {heads} heads"
                )
            if self.num_hidden_layers < 2:
                raise ValueError("backbone stages needs two attention blocks or more")
