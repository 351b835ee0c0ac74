"""Second moments of what Linears read: H = 2 X^T X / tokens, or its diagonal alone.

Where asked for, also the extremes and the mean size of every input.

Only real tokens count: padding is left out with the mask that the stack's tokens have. Linears
that read the very same tensor (query, key and value; gate and up) share one matrix, found by the
identity of their input; sharing saves two thirds and half of their work. Of a matrix only the
panels on and above the diagonal are multiplied, 512 columns at a time, and mirrored at the end:
(1 + 512 / I) / 2 of the operations, so 56 % for 4096 inputs. Sums are float32. A forward pass ends
where the last of these inputs was read: what would be computed from it is not.

Legend: B rows, S tokens, T tokens of all rows that count, I inputs of a Linear.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.model.families import present
from compressor.model.forward import run_backbone
from compressor.model.model import Model

_PANEL = 512


class _AllRead(Exception):
    """What the Linears read of a batch is known; the rest of the forward pass is not needed."""


def mask_keys(model: Model) -> dict[str, str]:
    """{Linear in a block: batch key of the mask of the tokens it reads}.

    Keys and values of cross attention read what the first stack gives, all others their own stack.
    """
    names = {id(module): name for name, module in model.module.named_modules()}
    found: dict[str, str] = {}
    for stack in model.family.stacks:
        for block in model.blocks(stack):
            linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
            found |= {names[id(linear)]: stack.mask for linear in linears}
            cross = present(block, stack.cross_qkv[1:]) if stack.cross_qkv else {}
            found |= {names[id(m)]: model.family.stacks[0].mask for m in cross.values()}
    return found


@dataclass(frozen=True)
class InputRange:
    """Over all real tokens: least and largest value of each input, and the sum of its sizes."""

    low_I: Tensor
    high_I: Tensor
    size_I: Tensor

    @classmethod
    def of(cls, x_TI: Tensor) -> "InputRange":
        """That of some tokens, at least one."""
        return cls(*x_TI.aminmax(dim=0), x_TI.abs().sum(0))

    def joined(self, other: "InputRange") -> "InputRange":
        """That of both."""
        low_I, high_I = self.low_I.minimum(other.low_I), self.high_I.maximum(other.high_I)
        return InputRange(low_I, high_I, self.size_I + other.size_I)

    @property
    def largest_I(self) -> Tensor:
        """max |x| of each input."""
        return torch.maximum(-self.low_I, self.high_I)


class Moments:
    """Running second moments of the inputs of some Linears; `whole` or the diagonal alone.

    Attributes:
        ranges: where asked for, what else is known of each group's input, by its leader.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        keys: Mapping[str, str],
        whole: bool,
        ranges: bool = False,
    ) -> None:
        self.linears, self.keys, self.whole = linears, keys, whole
        self.tokens: dict[str, int] = {}
        self.ranges: dict[str, InputRange] | None = {} if ranges else None
        self._sums: dict[str, Tensor] = {}
        self._leader: dict[str, str] = {}
        self._calls: int | None = None  # of the Linears in one batch

    @contextmanager
    def watching(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Add what the Linears read inside, which is left when nothing more is to be read.

        Args:
            batch: holds the masks.
        """
        last: list[tuple[str, Tensor]] = []  # holds one input: those that share it come together
        calls = 0

        def hook(name: str) -> Any:
            def read(module: nn.Module, args: tuple[Any, ...]) -> None:
                nonlocal calls
                if not last or last[0][1] is not args[0]:
                    last[:] = [(name, args[0])]
                leader = self._leader.setdefault(name, last[0][0])
                assert leader == last[0][0], f"'{name}' shares its input in some batches only"
                if leader == name:
                    self._add(name, args[0].detach(), batch.get(self.keys[name]))
                calls += 1
                if calls == self._calls:
                    raise _AllRead

            return read

        with ExitStack() as hooks, suppress(_AllRead):
            for name, linear in self.linears.items():
                hooks.enter_context(linear.register_forward_pre_hook(hook(name)))
            yield
        self._calls = calls

    @property
    def shared(self) -> dict[str, list[str]]:
        """{Linear whose sums are kept: all Linears that read the same input, itself included}."""
        blind = self.linears.keys() - self._leader.keys()
        assert not blind, f"{', '.join(sorted(blind))} saw no token"
        found: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            found.setdefault(leader, []).append(name)
        return found

    def _add(self, name: str, x: Tensor, mask_BS: Tensor | None) -> None:
        x_TI = x.reshape(-1, x.shape[-1]).float()
        if mask_BS is not None:
            assert mask_BS.numel() == len(x_TI), f"'{name}' reads other tokens than its mask has"
            x_TI = x_TI[mask_BS.reshape(-1).bool()]
        self.tokens[name] = self.tokens.get(name, 0) + len(x_TI)
        inputs = x_TI.shape[1]
        if self.ranges is not None and len(x_TI):
            new = InputRange.of(x_TI)
            self.ranges[name] = self.ranges[name].joined(new) if name in self.ranges else new
        if not self.whole:
            self._sum(name, inputs).add_(x_TI.square().sum(0))
            return
        sums_II = self._sum(name, inputs, inputs)
        for start in range(0, inputs, _PANEL):
            panel_TP = x_TI[:, start : start + _PANEL]
            sums_II[start : start + _PANEL, start:].addmm_(panel_TP.T, x_TI[:, start:])

    def _sum(self, name: str, *shape: int) -> Tensor:
        if name not in self._sums:
            self._sums[name] = torch.zeros(shape)
        return self._sums[name]

    def pop(self, leader: str) -> Tensor:
        """2 X^T X / tokens of a group, [I, I], or its diagonal [I]; gone from here afterwards."""
        found = self._sums.pop(leader)
        tokens = self.tokens[leader]
        assert tokens, f"'{leader}' saw no token"
        if self.whole:
            for start in range(_PANEL, len(found), _PANEL):
                rows = slice(start - _PANEL, start)
                found[start:, rows] = found[rows, start:].T
        return found.mul_(2 / tokens)


def mean_squares(
    model: Model, linears: Mapping[str, nn.Linear], batches: Iterable[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """{Linear: twice the mean square of each of its inputs [I]} in the model as it is."""
    moments = Moments(linears, mask_keys(model), whole=False)
    for batch in batches:
        with moments.watching(batch):
            run_backbone(model, batch)
    found = {leader: moments.pop(leader) for leader in moments.shared}
    return {name: found[leader] for leader, names in moments.shared.items() for name in names}
