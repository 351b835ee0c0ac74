"""What every sparse pruning method is told: how many weights go, and in which pattern."""

from typing import Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from compressor.errors import CompressError
from compressor.model.manifest import WeightFormat
from compressor.model.model import Model
from compressor.model.sparse import prunable, refuse_undivided
from compressor.numerics.masks import UNSTRUCTURED, fits, group_of, implies, sparsity_of
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

    @field_validator("pattern")
    @classmethod
    def _known(cls, pattern: str) -> str:
        group_of(pattern)  # raises ValueError where it is no pattern
        return pattern

    @model_validator(mode="after")
    def _agree(self) -> "SparseOptions":
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
        CompressError: N:M does not divide the inputs of a layer, and that is to be refused, or of
            any; or a layer has another N:M already, and neither pattern says what both do.
    """
    linears = prunable(model)
    if options.undivided == "refuse":
        refuse_undivided(linears, options.pattern)
    found = {name: m for name, m in linears.items() if fits(m.in_features, options.pattern)}
    if not found:
        raise CompressError(
            f"pattern {options.pattern} divides the inputs of no layer, so nothing would be pruned",
            "pattern: unstructured, or an M that divides widths, e.g. 2:4",
        )
    for name in found:
        _refuse_odd_pair(name, model.formats.get(name), options.pattern)
    return found


def _refuse_odd_pair(name: str, before: WeightFormat | None, pattern: str) -> None:
    had = None if before is None else before.pattern
    if had is not None and not implies(pattern, had) and not implies(had, pattern):
        raise CompressError(
            f"'{name}' has the pattern {had} already, and no layer can promise {pattern} beside "
            "it: neither of the two implies the other",
            f"pattern: {had} or unstructured, or take away the stage that made {had}",
        )


def kept_pattern(before: WeightFormat | None, pattern: str) -> str:
    """What to promise of a layer whose zeros stayed and that was pruned to `pattern`.

    It has both patterns then, and the stricter one says so.
    """
    if before is None or before.pattern is None or implies(pattern, before.pattern):
        return pattern
    assert implies(before.pattern, pattern), f"{before.pattern} and {pattern} in one layer"
    return before.pattern
