"""Options of every Minitron cut, of one model or of a search's candidates, and their presets.

Where the paper (arXiv 2407.14679) and NVIDIA Model Optimizer differ, a preset names one of them.
"""

from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import ArgsKwargs

from compressor.errors import CompressError
from compressor.model.model import Model
from compressor.options import options
from compressor.prune.scores import ScoreOptions

_PAPER = {"head_score": "heads", "merge_heads": True, "norms": "all"}
_LIBRARY = {"head_score": "features", "merge_heads": False, "norms": "blocks", "multiple": 64}
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER | {"layer_importance": "perplexity"},  # 2408.11796 counts right answers
    "library": _LIBRARY | {"layer_importance": "block_influence"},
}


def refuse_formats(model: Model) -> None:
    """Raise CompressError when a weight format stands in the way of slicing weights."""
    if model.formats:
        raise CompressError(
            "prune.minitron changes shapes, which would break the weight formats of "
            f"{len(model.formats)} modules",
            "put prune.minitron before the stage that made them: trim first, then sparsify",
        )


@options
class CutOptions(ScoreOptions):
    """How units are scored and cut; how far to cut is said elsewhere."""

    preset: Literal["paper", "library"] | None = Field(
        None, description="fills in what is not given: as in the paper, or in Model Optimizer"
    )
    multiple: int = Field(8, ge=1, description="a budget rounds the MLP to a multiple of this")
    merge_heads: bool = Field(
        False, description="merge heads that go into those that stay, instead of dropping them"
    )
    rescale: bool = Field(
        False, description="scale RMSNorms so that removed channels count as zeros (hidden only)"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """Options of the preset that are not given; what is given counts."""
        direct = isinstance(given, ArgsKwargs)
        values = dict((given.kwargs if direct else given) or {})
        filled = _PRESETS.get(str(values.get("preset")), {}) | values
        return ArgsKwargs(given.args, filled) if direct else filled
