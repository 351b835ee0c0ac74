"""Where a side path starts: what pruning takes away, summed over groups of k inputs.

SLoRB of arXiv 2407.20584. The mean divides by all k places of a group, pruned or not, as the code
that was released does.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.model import Model
from compressor.model.side import Side

Start = Literal["mean", "sum", "xavier"]


def side_of(pruned_OI: Tensor, k: int, start: Start, learns: bool) -> Side:
    """The side path of a layer.

    Args:
        pruned_OI: the weights that the mask takes away; 0 where it keeps them.
        k: inputs of a group; divides I.
        start: mean or sum of a group's pruned weights, or S = 0 and X drawn (Glorot uniform).
        learns: whether X is a matrix of its own.
    """
    groups_ORG = pruned_OI.unflatten(1, (-1, k))
    if start == "xavier":
        assert learns
        in_RI = nn.init.xavier_uniform_(torch.empty(groups_ORG.shape[1], pruned_OI.shape[1]))
        return Side(torch.zeros(groups_ORG.shape[:2]), in_RI)
    out_OR = groups_ORG.sum(dim=2) if start == "sum" else groups_ORG.mean(dim=2)
    return Side(out_OR, group_sums(pruned_OI.shape[1], k) if learns else None)


def group_sums(inputs: int, k: int) -> Tensor:
    """X_RI that sums every k consecutive inputs: 1 where i k <= j < (i + 1) k."""
    return torch.eye(inputs // k).repeat_interleave(k, dim=1)


def refuse_sides(
    model: Model, linears: Mapping[str, nn.Linear], k: int, undivided: Literal["refuse", "dense"]
) -> None:
    """Raise CompressError where k does not divide a layer's inputs, or a side path is there."""
    if any(form.side_rank for form in model.formats.values()):  # an empty model has no paths
        raise CompressError(
            "the model has side paths already", "side: null trains those that are there"
        )
    for name, linear in linears.items():
        if undivided == "refuse" and linear.in_features % k:
            raise CompressError(
                f"side: {k} does not divide the {linear.in_features} inputs of '{name}'",
                "undivided: dense leaves such layers without a side path",
            )
