"""Whether a model's numbers are numbers."""

from compressor.errors import CompressError
from compressor.model.model import Model


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
