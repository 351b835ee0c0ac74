"""Activation importance of neurons, heads, residual channels and layers, in one forward pass.

Source: arXiv 2407.14679, section 2.2, and the score collection of NVIDIA Model Optimizer. With
a_bsu the activation of unit u at token s of sequence b,

    score_u = Agg_b Agg_s a_bsu        Agg in {mean of |x|, L2 norm, variance}

MLP neuron: the input of the MLP's output Linear. Head: the input of attention's output Linear,
aggregated per feature, then the L2 norm over the head's features, or the norm first. Residual
channel: the outputs of the norms, summed over norms and layers. Layer, or n layers in a row:
1 - cos(input, output), a mean over tokens.

Two differences from Model Optimizer: padding is left out, and, unless `norms` says blocks, every
norm on the residual stream counts, also the ones outside the blocks. In a post-norm model (BERT)
norm outputs *are* the stream and the first block reads the norm of the embeddings; in a pre-norm
one the last norm is what the head reads.

Legend: B sequences, S tokens, U units (neurons, features or channels).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.model.families import Stack, present
from compressor.model.forward import accepted, without_cache
from compressor.model.model import Model

Aggregation = Literal["mean", "l2", "variance"]
HeadScore = Literal["features", "heads"]
Norms = Literal["all", "blocks"]
Tap = Callable[[Tensor, Tensor], None]  # sees a module's input and output


@dataclass(frozen=True)
class StackImportance:
    """Scores of one stack, float32, higher is more important; layers count from the first block.

    Attributes:
        neurons_LM: [layers, mlp].
        heads_LH: [layers, heads], query heads in the order of the projection's rows.
        layers_L: [layers], block influence in 0 .. 2, or another ranking of depth.py.
        cross_LH: [layers, heads] of cross attention, where the stack has it.
        windows_W: [layers - n + 1], of n consecutive layers by the first, where they were ranked;
            layers_L is block influence then.
    """

    neurons_LM: Tensor
    heads_LH: Tensor
    layers_L: Tensor
    cross_LH: Tensor | None = None
    windows_W: Tensor | None = None


@dataclass(frozen=True)
class Importance:
    """Scores of every stack, and of the channels of the residual stream, hidden_D [hidden]."""

    stacks: tuple[StackImportance, ...]
    hidden_D: Tensor


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
    head_score: HeadScore = "features",
    norms: Norms = "all",
    windows: Sequence[int] = (),
    advance: Callable[[int], None] = lambda n: None,
) -> Importance:
    """Score every unit of a model.

    Args:
        batches: what the model reads; a mask is 1 at real tokens and absent where all are real.
            Every sequence has at least one. `advance(1)` is called after each.
        head_score: `features` aggregates every feature and takes the norm over those of a head at
            the end (Model Optimizer); `heads` takes the norm at each token and aggregates that
            (the paper).
        norms: which outputs score residual channels: those of all norms on the stream, or of the
            norms inside blocks (Model Optimizer).
        windows: for each stack, how many consecutive layers are compared as one (x_i with
            x_{i+n}); 0 or nothing: none.
    """
    tally = _Tally(model, over_sequence, head_score, norms, windows)
    with ExitStack() as hooks:
        for module, tap in tally.taps():
            hooks.enter_context(_attach(module, tap))
        for batch in batches:
            tally.batch = batch
            model.module(**accepted(model, batch), **without_cache(model))
            advance(1)
    return tally.result(over_batch)


class _Tally:
    """Running moments of every unit; the taps read the masks of the batch under way."""

    def __init__(
        self,
        model: Model,
        over_sequence: Aggregation,
        head_score: HeadScore,
        norms: Norms,
        windows: Sequence[int],
    ) -> None:
        self.model = model
        self.head_score: HeadScore = head_score
        self.norms = model.family.norms if norms == "all" else ()
        self.windows = dict(zip(model.family.stacks, windows, strict=False))
        self.how: Aggregation = over_sequence
        self.batch: dict[str, Tensor] = {}
        self.found: dict[str, Moments] = {}
        self.inputs: dict[tuple[Stack, int], Tensor] = {}  # of the blocks of open windows

    def taps(self) -> Iterator[tuple[nn.Module, Tap]]:
        """(module, tap) of all that is watched."""
        base, family = self.model.base, self.model.family
        for name in self.norms:
            yield base.get_submodule(name), self._output(f"norm {name}", family.stack_of(name))
        for stack in family.stacks:
            for i, block in enumerate(self.model.blocks(stack)):
                place = f"{stack.blocks}.{i}"
                yield block, self._across(f"layer {place}", stack)
                if window := self.windows.get(stack):
                    yield block, self._window(stack, i, window)
                for name, norm in present(block, stack.norms).items():
                    yield norm, self._output(f"norm {place}.{name}", stack)
                inner = {"mlp": stack.mlp_out, "head": stack.attn_out, "cross": stack.cross_out}
                for kind, name in inner.items():
                    if name is not None:
                        yield block.get_submodule(name), self._input(f"{kind} {place}", stack)

    def _moments(self, key: str) -> Moments:
        return self.found.setdefault(key, Moments())

    def _real(self, stack: Stack, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations [B, S, U] and their mask [B, S]; OPT folds B and S together in its MLP."""
        mask_BS = self.batch.get(stack.mask)
        if mask_BS is None:
            mask_BS = torch.ones(x.shape[:2])
        assert bool(mask_BS.any(dim=1).all()), "a sequence without real tokens"
        return x.reshape(*mask_BS.shape, -1), mask_BS

    def _input(self, key: str, stack: Stack) -> Tap:
        moments, heads = self._moments(key), self.model.sizes["heads"]
        at_tokens = self.head_score == "heads" and not key.startswith("mlp ")

        def tap(x: Tensor, _: Tensor) -> None:
            x_BSU, mask_BS = self._real(stack, x)
            if at_tokens:
                x_BSU = x_BSU.float().unflatten(2, (heads, -1)).norm(dim=3)
            moments.add(over_tokens(x_BSU, mask_BS, self.how))

        return tap

    def _output(self, key: str, stack: Stack) -> Tap:
        moments = self._moments(key)
        return lambda _, y: moments.add(over_tokens(*self._real(stack, y), self.how))

    def _across(self, key: str, stack: Stack) -> Tap:
        moments = self._moments(key)
        return lambda x, y: moments.add(influence(x, *self._real(stack, y)).unsqueeze(1))

    def _window(self, stack: Stack, last: int, length: int) -> Tap:
        """Compare the output of block `last` with the input of the first of its window."""
        first = last - length + 1

        def tap(x: Tensor, y: Tensor) -> None:
            self.inputs[stack, last] = x
            if first >= 0:
                before = self.inputs.pop((stack, first))
                self._across(f"window {stack.blocks}.{first}", stack)(before, y)

        return tap

    def result(self, how: Aggregation) -> Importance:
        """Scores of everything that was watched."""
        stacks = tuple(self._scores(stack, how) for stack in self.model.family.stacks)
        streams = [m.result(how) for key, m in self.found.items() if key.startswith("norm ")]
        return Importance(stacks, torch.stack(streams).sum(dim=0))

    def _scores(self, stack: Stack, how: Aggregation) -> StackImportance:
        depth, window = len(self.model.blocks(stack)), self.windows.get(stack)

        def rows(kind: str, how: Aggregation, n: int = depth) -> Tensor:
            places = (f"{stack.blocks}.{i}" for i in range(n))
            return torch.stack([self.found[f"{kind} {place}"].result(how) for place in places])

        def heads(kind: str) -> Tensor:
            return rows(kind, how).unflatten(1, (self.model.sizes["heads"], -1)).norm(dim=2)

        return StackImportance(
            neurons_LM=rows("mlp", how),
            heads_LH=heads("head"),
            layers_L=rows("layer", "mean").squeeze(1),
            cross_LH=heads("cross") if stack.cross_out else None,
            windows_W=rows("window", "mean", depth - window + 1).squeeze(1) if window else None,
        )


def _attach(module: nn.Module, tap: Tap) -> Any:
    """Call `tap(input, output)` at each forward of `module`; the handle is a context manager."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tap(stream_into(args, kwargs), output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(hook, with_kwargs=True)


def stream_into(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a block or a Linear reads: its first argument, or the one called hidden_states."""
    return args[0] if args else kwargs["hidden_states"]
