"""One engine against a probe: how far every output is off, and whether it writes the same text.

    relative error      |got - wanted| / |wanted|, norms over real tokens, worst batch
    max, mean           of |got - wanted|, over all batches
    top1_agreement      share of positions with the same most likely answer
    greedy              the continuation of the first batch, fed token by token to the cache: its
                        logits are the output `continuation`, its tokens must be the expected ones

A token that differs is a tie, and no fault, where torch's own logits of the two tokens are closer
than the tolerance times its largest logit: sums in another order may then choose either.
"""

from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.engines import Engine
from compressor.engines.genai import GenaiEngine
from compressor.engines.generate import follow
from compressor.model.forward import output_mask
from compressor.model.probe import largest_difference, read_continuation, read_probe

_TEXT = "continuation"


@dataclass(frozen=True)
class Greedy:
    """Tokens of the continuation; `wrong` names the first that is neither equal nor a tie."""

    tokens: int
    equal: int
    wrong: str


@dataclass
class Comparison:
    """What an engine gives for a probe.

    Attributes:
        errors: {output: relative error}.
        loop: why the engine's own generate loop is wrong, or "".
    """

    errors: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    greedy: Greedy | None = None
    loop: str = ""
    _sums: dict[str, Tensor] = field(default_factory=dict)  # [sum of differences, their number]
    _top1: Tensor = field(default_factory=lambda: torch.zeros(2))  # [same answers, positions]

    def add(self, wanted: dict[str, Tensor], got: dict[str, Tensor], mask: Tensor | None) -> None:
        """Take in the outputs of one batch."""
        for name, error in largest_difference(wanted, got, mask).items():
            self.errors[name] = max(self.errors.get(name, 0.0), error)
            if error == float("inf"):
                continue
            target, value = wanted[name], got[name]
            if target.dim() == 3 and mask is not None and target.shape[:2] == mask.shape:
                target, value = target[mask.bool()], value[mask.bool()]
            off = (value.double() - target.double()).abs()
            self.largest[name] = max(self.largest.get(name, 0.0), float(off.max()))
            sums = torch.tensor([float(off.sum()), off.numel()], dtype=torch.float64)
            self._sums[name] = self._sums.get(name, torch.zeros(2, dtype=torch.float64)) + sums
            if name in ("logits", _TEXT):
                same = target.argmax(dim=-1) == value.argmax(dim=-1)
                self._top1 = self._top1 + torch.tensor([float(same.sum()), same.numel()])

    def differences(self) -> dict[str, Any]:
        """{output: {max, mean}}, and top1_agreement and greedy {tokens, equal} where there are."""
        found: dict[str, Any] = {
            name: {"max": self.largest[name], "mean": float(total / count)}
            for name, (total, count) in self._sums.items()
        }
        if self._top1[1]:
            found["top1_agreement"] = float(self._top1[0] / self._top1[1])
        if self.greedy is not None:
            found["greedy"] = {"tokens": self.greedy.tokens, "equal": self.greedy.equal}
        return found


def compare(engine: Engine, directory: Path, tolerance: float) -> Comparison:
    """Run an engine on the probe of a directory.

    Args:
        tolerance: what is allowed; decides which tokens are ties.

    Raises:
        CompressError: the probe is missing or damaged.
    """
    found = Comparison()
    exchanges = read_probe(directory)
    for inputs, expected in exchanges:
        found.add(expected, engine.outputs(inputs), output_mask(inputs))
    wanted = read_continuation(directory)
    if wanted is not None:
        prompt, text = exchanges[0][0], wanted.argmax(dim=-1)
        got = follow(engine, prompt, wanted.shape[1], text)
        found.add({_TEXT: wanted}, {_TEXT: got}, None)
        found.greedy = _greedy(wanted[0], got[0], tolerance)
        found.loop = _loop(engine, prompt, wanted.shape[1])
    return found


def _greedy(wanted_TV: Tensor, got_TV: Tensor, tolerance: float) -> Greedy:
    expected, chosen = wanted_TV.argmax(dim=-1), got_TV.argmax(dim=-1)
    wrong = ""
    for step in (expected != chosen).nonzero().flatten().tolist():
        row = wanted_TV[step]
        gap = float(row[expected[step]] - row[chosen[step]])
        if not wrong and not gap <= tolerance * float(row.abs().max()):
            wrong = (
                f"token {step + 1} of {len(expected)} is {int(chosen[step])} instead of "
                f"{int(expected[step])}, whose logits in torch are {gap:.1e} apart"
            )
    return Greedy(len(expected), int((expected == chosen).sum()), wrong)


def _before(ends: list[int], text: list[int]) -> list[int]:
    """A text up to the token that ends it, and without it."""
    return list(takewhile(lambda token: token not in ends, text))


def _loop(engine: Engine, prompt: dict[str, Tensor], count: int) -> str:
    """What an engine with a generate loop of its own writes, against our steps in that engine."""
    if not isinstance(engine, GenaiEngine):
        return ""
    found = engine.generate(prompt["input_ids"][0].tolist(), count)
    wanted = follow(engine, prompt, count).argmax(dim=-1)[0].tolist()
    if found == _before(engine.ends, wanted):
        return ""
    return f"the loop of {engine.name} writes {found}, its single steps {wanted}"
