"""Attention heads: which rows of the projections are theirs, their order, and residual merging.

Residual head merging, arXiv 2407.14679, section 2.3. Going from L heads to K, ordered by rank
from 1, the paper prints

    head_i <- head_i + (head_i - head_{2K-i+1})     for i in [K - (L - K), K]

so that rank K takes in rank K+1, rank K-1 rank K+2, and so on. The source leaves open what a head
is made of and where the range begins; our reading:

- head_{2K-i+1} must exist, so i begins at 2K-L+1, and at 1 where K < L/2: ranks above 2K then
  have no partner and are dropped.
- A head is its rows of Q, K and V, weights and biases. The paper merges "only the query heads"
  of grouped queries, so K and V rows, which serve a whole group, stay as they are there, and
  ranks, K and L count inside a group: nothing is merged across groups.
- The columns of the output projection are not merged, nor is the column of a removed head in
  T5's table of position biases.

Legend: L layers, H query heads, G groups, Q query heads of a group, U units (heads or groups),
D features of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compressor.model.families import Stack
from compressor.model.importance import Importance, StackImportance
from compressor.model.model import Model

Rows = tuple[str, Tensor]  # path of a Linear, [U, D] its rows of every unit


def attention_rows(stack: Stack, sizes: dict[str, int]) -> tuple[Rows, ...]:
    """Rows of queries, keys and values, whatever the layout of their Linears."""
    heads, groups, size = sizes["heads"], sizes["kv_heads"], sizes["head_dim"]
    if stack.qkv_layout == "separate":
        return _separate(stack.qkv, (heads, groups, groups), size)
    if stack.qkv_layout == "interleaved":
        parts = torch.arange(3 * heads * size).view(heads, 3, size).unbind(1)
    else:
        units = heads + 2 * groups
        parts = torch.arange(units * size).view(units, size).split((heads, groups, groups))
    return tuple((stack.qkv[0], rows_UD) for rows_UD in parts)


def cross_rows(stack: Stack, sizes: dict[str, int]) -> tuple[Rows, ...]:
    """The same of cross attention, where every head has its own key."""
    assert stack.cross_qkv is not None
    return _separate(stack.cross_qkv, (sizes["heads"],) * 3, sizes["head_dim"])


def _separate(paths: Sequence[str], units: Sequence[int], size: int) -> tuple[Rows, ...]:
    pairs = zip(paths, units, strict=True)
    return tuple((path, torch.arange(n * size).view(n, size)) for path, n in pairs)


def own_scores(stack: Stack, scores: StackImportance) -> Tensor:
    """Scores [L, H] of self attention; where one position bias serves all layers, their sum."""
    if stack.head_tables:  # then all layers keep the same heads
        return scores.heads_LH.sum(dim=0).expand_as(scores.heads_LH)
    return scores.heads_LH


def order(scores_U: Tensor) -> list[int]:
    """Indices from the highest score to the lowest; ties begin with the lower index."""
    return scores_U.argsort(descending=True, stable=True).tolist()


def ranked_heads(
    scores_H: Tensor, before: dict[str, int], after: dict[str, int]
) -> list[list[int]]:
    """Heads of every group that stays, best first; of each list equally many will stay.

    Without grouped queries all heads are one list. A group scores the L2 norm of its heads.
    """
    size = before["heads"] // before["kv_heads"]
    if size == 1:
        return [order(scores_H)]
    scores_GQ = scores_H.unflatten(0, (-1, size))
    groups = sorted(order(scores_GQ.norm(dim=1))[: after["kv_heads"]])
    return [[group * size + head for head in order(scores_GQ[group])] for group in groups]


def best_heads(scores_H: Tensor, before: dict[str, int], after: dict[str, int]) -> list[int]:
    """The heads that stay, ascending."""
    ranked = ranked_heads(scores_H, before, after)
    per_list = after["heads"] // len(ranked)
    return sorted(head for heads in ranked for head in heads[:per_list])


@torch.no_grad()
def merge_heads(model: Model, scores: Importance, after: dict[str, int]) -> None:
    """Merge the heads that will go into those that will stay; shapes do not change.

    Args:
        after: the sizes that the model will be cut to, with these very scores.
    """
    before = model.sizes
    for stack, own in zip(model.family.stacks, scores.stacks, strict=True):
        heads_LH = own_scores(stack, own)
        for i, block in enumerate(model.blocks(stack)):
            ranked = ranked_heads(heads_LH[i], before, after)
            grouped = before["heads"] > before["kv_heads"]
            rows = attention_rows(stack, before)
            _merge(block, rows[:1] if grouped else rows, ranked, after["heads"])
            if own.cross_LH is not None:
                ranked = ranked_heads(own.cross_LH[i], before, after)
                _merge(block, cross_rows(stack, before), ranked, after["heads"])


def _merge(block: nn.Module, rows: Sequence[Rows], ranked: list[list[int]], heads: int) -> None:
    stay = heads // len(ranked)
    for path, rows_UD in rows:
        for parameter in block.get_submodule(path).parameters(recurse=False):
            for group in ranked:
                for rank in range(max(1, 2 * stay - len(group) + 1), stay + 1):
                    head, partner = rows_UD[group[rank - 1]], rows_UD[group[2 * stay - rank]]
                    parameter[head] = 2 * parameter[head] - parameter[partner]
