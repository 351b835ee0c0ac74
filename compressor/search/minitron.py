"""Minitron's search: prune to every shape within a budget, retrain each lightly, keep the best.

arXiv 2407.14679, sections 2.3 and 3. Shapes are enumerated inside the budget, +-5 % (see
model/candidates.py for the lists that are not given); each is pruned by prune.minitron, retrained
for some hundred steps by distillation and ranked by its loss on the validation split. The least
loss wins. Ranking before the retraining misleads: width-pruned models start worse than mixed ones
and end better, and the ranking moves until about step 300 (there, 400 steps of 1152 rows).

Where we differ: the budget may also be a share of the original's latency, measured on this
machine; more shapes than `candidates` are thinned to some that are unlike each other. run/search.py
drives the search: every candidate is an ordinary run of two stages, and all share one measurement
of importance. `length` is also that of the rows that latency is timed with. Retrain the winner in
full with a distill stage.
"""

from typing import Annotated, Any

from pydantic import Field, model_validator

from compressor.options import exactly_one, options
from compressor.prune.cutting import CutOptions
from compressor.training.options import Train, defaulting

_BUDGETS = ("parameters", "bytes", "latency")
_AXES = ("layers", "decoder_layers", "heads", "kv_heads", "hidden", "mlp")


@options
class Options(CutOptions):
    """Exactly one of `parameters`, `bytes` and `latency` is the budget."""

    parameters: float | None = Field(
        None, gt=0, lt=1, description="share of the original's parameters that stays"
    )
    bytes: int | None = Field(None, ge=1, description="bytes of the weights on disk")
    latency: float | None = Field(
        None, gt=0, lt=1, description="share of the original's latency, measured on this machine"
    )
    tolerance: float = Field(0.05, gt=0, lt=1, description="a shape may miss the budget by this")
    layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="depths to try; default all down to 3/4"
    )
    decoder_layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="depths of an encoder-decoder's decoder; default as layers"
    )
    heads: tuple[int, ...] | None = Field(
        None, min_length=1, description="query heads to try; default eighths down to 1/4"
    )
    kv_heads: tuple[int, ...] | None = Field(
        None, min_length=1, description="key and value heads to try; default all stay"
    )
    hidden: tuple[int, ...] | None = Field(
        None, min_length=1, description="residual widths to try; default eighths down to 1/4"
    )
    mlp: tuple[int, ...] | None = Field(
        None, min_length=1, description="MLP widths to try; default what meets the budget"
    )
    candidates: int = Field(12, ge=1, description="shapes to train, at most")
    method: str = Field("distill.kd", description="the distill method of the light retraining")
    train: Annotated[Train, defaulting(steps=400)] = Field(
        Train(steps=400), description="how long and how fast each is retrained"
    )
    objective: dict[str, Any] = Field({}, description="other options of the distill method")
    threads: int = Field(1, ge=1, description="threads of a measured latency")

    @model_validator(mode="after")
    def _one_budget(self) -> "Options":
        exactly_one(self, _BUDGETS)
        if not self.method.startswith("distill."):
            raise ValueError(f"method must be a distill method (got {self.method})")
        if "train" in self.objective:
            raise ValueError("train stands beside objective, not in it")
        if self.objective.get("correct_teacher"):
            raise ValueError("candidates are ranked by one teacher, so none may correct it")
        return self

    @property
    def lists(self) -> dict[str, tuple[int, ...]]:
        """{axis: sizes} of the lists that are given."""
        given = {axis: getattr(self, axis) for axis in _AXES}
        return {axis: tuple(dict.fromkeys(sizes)) for axis, sizes in given.items() if sizes}
