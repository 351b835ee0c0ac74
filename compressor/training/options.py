"""The options every trained method has, and the learning rate they describe."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from compressor.options import options


@options
class Train:
    """How long, on how much text and how fast a method trains."""

    steps: int = Field(default=300, ge=1, le=10_000_000, description="optimizer steps")
    batch: int = Field(default=16, ge=1, le=65_536, description="rows of one forward pass")
    accumulate: int = Field(default=1, ge=1, le=65_536, description="forward passes of one step")
    length: int = Field(default=128, ge=2, le=1_048_576, description="tokens of a row, at most")
    lr: float = Field(default=5e-4, gt=0, le=1, description="highest learning rate")
    warmup: int = Field(default=20, ge=0, description="steps of linear rise from 0")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="how the learning rate falls after the warm-up"
    )
    final: float = Field(default=0.05, ge=0, le=1, description="share of lr left at the end")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="AdamW, on matrices only")
    betas: tuple[float, float] = Field(default=(0.9, 0.98), description="AdamW's averages")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="auto takes bfloat16 where a short timing finds it clearly faster",
    )
    snapshot_seconds: float = Field(default=300, ge=0, description="time between two snapshots")
    validate_every: int = Field(
        default=0,
        ge=0,
        description="steps between two looks at validation rows, of which the best weights are "
        "kept; 0: the last weights, whatever they are",
    )
    patience: int = Field(
        default=0, ge=0, description="looks without a better one that end the training; 0: none do"
    )

    @model_validator(mode="after")
    def _in_range(self) -> "Train":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be at least 0 and below 1")
        if self.patience and not self.validate_every:
            raise ValueError("patience counts looks: give validate_every too, e.g. 50")
        return self


def defaulting(**defaults: Any) -> BeforeValidator:
    """For Annotated[Train, ...]: what holds where a user names other options of `train` only."""
    return BeforeValidator(
        lambda given: {**defaults, **given} if isinstance(given, Mapping) else given
    )


def lr_factor(options: Train, step: int) -> float:
    """Share of `lr` at `step`, which counts from 0: warm-up, then the schedule down to `final`."""
    warmup = min(options.warmup, options.steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if options.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, options.steps - 1 - warmup)
    rest = 1 - done if options.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return options.final + (1 - options.final) * rest
