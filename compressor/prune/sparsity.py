"""What every sparse pruning method is told: how many weights go, and in which pattern."""

from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from compressor.errors import CompressError
from compressor.model.manifest import WeightFormat
from compressor.model.model import Model
from compressor.model.sparse import prunable, refuse_undivided
from compressor.numerics.masks import UNSTRUCTURED, fits, group_of, sparsity_of
from compressor.options import options


@options
class SparseOptions:
    """How many weights of every layer go, and in which pattern."""

    sparsity: float | None = Field(
        None, gt=0, lt=1, description="share of weights that go: 0.5, or what N:M means"
    )
    pattern: str = Field(
        UNSTRUCTURED, description="unstructured, or N:M: N of every M consecutive inputs stay"
    )
    undivided: Literal["refuse", "dense"] = Field(
        "refuse", description="a layer whose inputs N:M does not divide: refuse it, or leave it"
    )

    @model_validator(mode="after")
    def _agree(self) -> "SparseOptions":
        group_of(self.pattern)  # raises ValueError where it is no pattern
        meant = sparsity_of(self.pattern)
        if meant is not None and self.sparsity not in (None, meant):
            raise ValueError(f"pattern {self.pattern} means sparsity {meant:g}; leave sparsity out")
        return self

    @property
    def share(self) -> float:
        """Share of weights that go."""
        return self.sparsity or sparsity_of(self.pattern) or 0.5


def targets(model: Model, options: SparseOptions) -> dict[str, nn.Linear]:
    """{module name: Linear} of the layers that lose weights, in the order of the forward pass.

    Raises:
        CompressError: N:M does not divide the inputs of a layer, and that is to be refused.
    """
    linears = prunable(model)
    if options.undivided == "refuse":
        refuse_undivided(linears, options.pattern)
    return {name: m for name, m in linears.items() if fits(m.in_features, options.pattern)}


def kept_pattern(before: WeightFormat | None, pattern: str) -> str:
    """What to promise of a layer pruned to `pattern`: an N:M it had holds unless fewer stay now."""
    if before is None or before.pattern is None or group_of(before.pattern) is None:
        return pattern
    had, now = sparsity_of(before.pattern), sparsity_of(pattern)
    return before.pattern if now is None or (had is not None and now <= had) else pattern


def refuse_unsound(model: Model) -> None:
    """Refuse NaN or infinite values anywhere in a model: pruned or not, they reach its outputs.

    Raises:
        CompressError: names the first tensor that has any.
    """
    for name, weight in model.module.named_parameters():
        if weight.is_floating_point() and weight.numel():
            ends = weight.detach().aminmax()  # NaN passes through, and no copy is made
            if not all(bool(end.isfinite()) for end in ends):
                raise CompressError(
                    f"'{name}' has NaN or infinite values", "start from a sound checkpoint"
                )
