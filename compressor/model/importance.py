"""Activation importance of neurons, heads, residual channels and layers, in one forward pass.

Source: arXiv 2407.14679, section 2.2, and the score collection of NVIDIA Model Optimizer. With
a_bsu the activation of unit u at token s of sequence b,

    score_u = Agg_b Agg_s a_bsu        Agg in {mean of |x|, L2 norm, variance}

MLP neuron: the input of the MLP's output Linear. Head: the input of attention's output Linear,
aggregated per feature, then the L2 norm over the head's features. Residual channel: the outputs
of the norms, summed over norms and layers. Layer: 1 - cos(input, output), a mean over tokens.

Two differences from Model Optimizer: padding is left out, and every norm on the residual stream
counts, also the ones outside the blocks. In a post-norm model (BERT) norm outputs *are* the
stream and the first block reads the norm of the embeddings; in a pre-norm one the last norm is
what the head reads.

Legend: B sequences, S tokens, U units (neurons, features or channels).
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.model.forward import accepted
from compressor.model.model import Model

Aggregation = Literal["mean", "l2", "variance"]
Tap = Callable[[Tensor, Tensor], None]  # sees a module's input and output


@dataclass(frozen=True)
class Importance:
    """Scores, float32, higher is more important; layers count from the first block.

    Attributes:
        neurons_LM: [layers, mlp].
        heads_LH: [layers, heads], query heads in the order of the projection's rows.
        hidden_D: [hidden].
        layers_L: [layers], block influence in 0 .. 2.
    """

    neurons_LM: Tensor
    heads_LH: Tensor
    hidden_D: Tensor
    layers_L: Tensor


@dataclass
class Moments:
    """Mean and spread of rows seen so far (Chan's update: nothing cancels in float32)."""

    count: int = 0
    mean_U: Tensor = field(default_factory=lambda: torch.zeros(()))
    spread_U: Tensor = field(default_factory=lambda: torch.zeros(()))  # sum (row - mean)^2

    def add(self, rows_BU: Tensor) -> None:
        """Take in more rows."""
        new, old = rows_BU.shape[0], self.count
        mean_U = rows_BU.mean(dim=0)
        delta_U = mean_U - self.mean_U
        self.count = old + new
        apart_U = delta_U.square() * (old * new / self.count)
        self.spread_U = self.spread_U + (rows_BU - mean_U).square().sum(dim=0) + apart_U
        self.mean_U = self.mean_U + delta_U * (new / self.count)

    def result(self, how: Aggregation) -> Tensor:
        """Aggregate of nonnegative rows (over them |x| is x)."""
        if how == "mean":
            return self.mean_U
        if how == "variance":
            return self.spread_U / self.count
        return (self.spread_U + self.count * self.mean_U.square()).sqrt()


def over_tokens(x_BSU: Tensor, mask_BS: Tensor, how: Aggregation) -> Tensor:
    """Aggregate each sequence over its real tokens: [B, U], float32, never negative."""
    x_BSU, mask_BS1 = x_BSU.float(), mask_BS.unsqueeze(-1).float()
    length_B1 = mask_BS1.sum(dim=1)
    if how == "mean":
        return (x_BSU.abs() * mask_BS1).sum(dim=1) / length_B1
    if how == "l2":
        return (x_BSU.square() * mask_BS1).sum(dim=1).sqrt()
    mean_B1U = ((x_BSU * mask_BS1).sum(dim=1) / length_B1).unsqueeze(1)
    return ((x_BSU - mean_B1U).square() * mask_BS1).sum(dim=1) / length_B1


def influence(before_BSD: Tensor, after_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """1 - cos(input, output) of every real token: [real tokens], float32."""
    keep_BS = mask_BS.bool()
    return 1 - torch.cosine_similarity(before_BSD[keep_BS].float(), after_BSD[keep_BS].float())


@torch.no_grad()
def measure_importance(
    model: Model,
    batches: Iterable[dict[str, Tensor]],
    *,
    over_batch: Aggregation = "l2",
    over_sequence: Aggregation = "mean",
    advance: Callable[[int], None] = lambda n: None,
) -> Importance:
    """Score every unit of a model with one stack of blocks.

    Args:
        batches: input_ids [B, S] and attention_mask [B, S]; 1 marks a real token. Every sequence
            has at least one. `advance(1)` is called after each.
    """
    (stack,) = model.family.stacks
    blocks = model.blocks(stack)
    norms = [model.base.get_submodule(name) for name in model.family.norms]
    norms += [block.get_submodule(name) for block in blocks for name in stack.norms]
    neurons, heads, turns = ([Moments() for _ in blocks] for _ in range(3))
    streams = [Moments() for _ in norms]
    mask_BS = torch.ones(0)  # of the batch under way; the taps read it

    def at_input(moments: Moments) -> Tap:
        return lambda x, _: moments.add(over_tokens(x, mask_BS, over_sequence))

    def at_output(moments: Moments) -> Tap:
        return lambda _, y: moments.add(over_tokens(y, mask_BS, over_sequence))

    def across(moments: Moments) -> Tap:
        return lambda x, y: moments.add(influence(x, y, mask_BS).unsqueeze(1))

    taps: list[tuple[nn.Module, Tap]] = [
        *zip((b.get_submodule(stack.mlp_out) for b in blocks), map(at_input, neurons), strict=True),
        *zip((b.get_submodule(stack.attn_out) for b in blocks), map(at_input, heads), strict=True),
        *zip(norms, map(at_output, streams), strict=True),
        *zip(blocks, map(across, turns), strict=True),
    ]
    with ExitStack() as hooks:
        for module, tap in taps:
            hooks.enter_context(_attach(module, tap))
        for batch in batches:
            mask_BS = batch["attention_mask"]
            assert bool(mask_BS.any(dim=1).all()), "a sequence without real tokens"
            model.base(**accepted(model, batch), use_cache=False)
            advance(1)

    features_LF = torch.stack([m.result(over_batch) for m in heads])
    return Importance(
        neurons_LM=torch.stack([m.result(over_batch) for m in neurons]),
        heads_LH=features_LF.unflatten(1, (model.sizes["heads"], -1)).norm(dim=2),
        hidden_D=torch.stack([m.result(over_batch) for m in streams]).sum(dim=0),
        layers_L=torch.cat([m.result("mean") for m in turns]),
    )


def _attach(module: nn.Module, tap: Tap) -> Any:
    """Call `tap(input, output)` at each forward of `module`; the handle is a context manager.

    Blocks and Linears take the stream first, by position or as `hidden_states`; a block returns
    a tensor or a tuple that starts with it.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = args[0] if args else kwargs["hidden_states"]
        tap(first, output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(hook, with_kwargs=True)
