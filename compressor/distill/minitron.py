"""Retraining a pruned model with its teacher: Minitron, section 3 (arXiv 2407.14679).

    L        = [c L_CLM] + L_logits + alpha L_is          alpha = L_logits / L_is, detached
    L_logits = 1/l sum_i KL(p_t^i || p_s^i)               p = softmax(z / T), over l tokens
    L_is     = 1/l sum_{k in H} sum_i (1 - cos(h_t^{k,i}, W h_s^{k,i}))

H holds the output of the embeddings and the output of one block, the third from the end in both
models. W is one learned map, shared by all k, where the widths differ. Forward KL, T = 1 and no
cross entropy are what the paper found best; L_is helps where depth is cut a lot. How much that is
it does not say: `auto` means at most two thirds of the teacher's layers, and that threshold is
ours. The paper reads hidden states behind a norm; cosine does not see the scale that a norm takes
out, so we read them as they are. The paper writes the loss of the embeddings' output without
naming it; ours is the cosine as well. Encoder-decoders match both stacks. The value of alpha L_is
is always that of L_logits, so it says nothing: the loss that is logged and compared leaves it out,
and models of any depth can be ranked by it. Its gradient is in.

The teacher may be corrected alongside (arXiv 2408.11796), or asked once and its largest logits
kept; see logits.py. Legend: B rows, S tokens, H width of the teacher, N real tokens.
"""

from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from compressor.distill.logits import LogitsLoss, LogitsOptions, refuse_unlike
from compressor.distill.predictions import predictions
from compressor.distill.states import (
    States,
    depths,
    real_positions,
    refuse_other_patches,
)
from compressor.errors import CompressError
from compressor.model.model import Model
from compressor.options import options
from compressor.training.losses import tokens_of
from compressor.training.parallel import team
from compressor.training.teacher import given_outputs

_DEEP = 2 / 3  # share of the teacher's layers up to which `auto` matches hidden states
_BEFORE_LAST = 2  # the matched block, counted back from the last
_SMALLEST = 1e-8  # of L_is, where student and teacher are the same

# YAML reads on and off as true and false
_Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda given: {True: "on", False: "off"}.get(given, given)),
]


@options
class Options(LogitsOptions):
    """Minitron's retraining."""

    ce: float = Field(0.0, ge=0, description="weight of plain cross entropy")
    intermediate: _Switch = Field("auto", description="match hidden states: auto, on or off")
    layer_pair: tuple[int, int] | None = Field(
        None, description="[teacher layer, student layer] from 1, matched whatever the depth"
    )


def objective(options: Options, student: Model, teacher: Model | None) -> nn.Module:
    """Minitron's loss between a pruned student and its teacher.

    Raises:
        CompressError: the models predict nothing, or different vocabularies; the pair names no
            layer; or the options exclude each other.
    """
    assert teacher is not None
    source = (options.top_k, options.correct_teacher)
    refuse_unlike("distill.minitron", student, teacher, options.kind, *source)
    matched = _matched(options, depths(student), depths(teacher))
    if matched:
        refuse_other_patches(student, teacher)
    weights = (1.0, options.ce)
    logits = LogitsLoss(student, teacher, options.kind, options.temperature, *weights, *source)
    return _Minitron(logits, matched)


def _matched(options: Options, own: list[int], above: list[int]) -> list[tuple[int, int, int]]:
    """(stack, teacher state, student state) of H; nothing where only logits count."""
    if options.layer_pair is not None:
        _refuse_pair(options, own, above)
        return [(0, 0, 0), (0, *options.layer_pair)]
    deep = any(mine <= _DEEP * theirs for mine, theirs in zip(own, above, strict=True))
    if options.intermediate == "off" or (options.intermediate == "auto" and not deep):
        return []
    found = []
    for stack, (mine, theirs) in enumerate(zip(own, above, strict=True)):
        pair = (max(1, theirs - _BEFORE_LAST), max(1, mine - _BEFORE_LAST))
        found += [(stack, 0, 0), (stack, *pair)]
    return found


def _refuse_pair(options: Options, own: list[int], above: list[int]) -> None:
    pair = options.layer_pair
    assert pair is not None
    if options.intermediate == "off":
        raise CompressError(
            "layer_pair names what is matched, and intermediate: off matches nothing",
            "intermediate: on, or layer_pair: null",
        )
    if len(own) > 1:
        raise CompressError(
            "layer_pair names the layers of one stack, and this model has two", "layer_pair: null"
        )
    if not (1 <= pair[0] <= above[0] and 1 <= pair[1] <= own[0]):
        raise CompressError(
            f"layer_pair [{pair[0]}, {pair[1]}]: the teacher has layers 1 to {above[0]}, the "
            f"student 1 to {own[0]}",
            "layer_pair: null",
        )


class _Minitron(nn.Module):
    def __init__(self, logits: LogitsLoss, matched: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.logits, self.matched = logits, matched
        self.student = logits.student
        self.cache_teacher, self.remarks = logits.cache_teacher, logits.remarks
        self.rates = logits.rates
        self.lift: nn.Module = nn.Identity()
        widths = logits.student.sizes["hidden"], logits.teacher.sizes["hidden"]
        if matched and widths[0] != widths[1]:
            self.lift = nn.Linear(*widths, bias=False)
        self.parts: dict[str, Tensor] = {}  # of the last loss, for the metrics

    @torch.no_grad()
    def targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's answers as they are kept on disk: largest logits and matched states."""
        above = self.logits.ask(batch, hidden=bool(self.matched))
        # float16 has no room for the residual stream of some models, and cosine needs no scale
        states = {k: normalize(v, dim=-1) for k, v in self._targets(above.hidden).items()}
        return self.logits.largest(above) | states

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        own = predictions(self.student, batch, hidden=bool(self.matched))
        if self.cache_teacher:
            above = target = given_outputs(batch) or self.targets(batch)
        else:
            above = self.logits.ask(batch, hidden=bool(self.matched))
            target = self._targets(above.hidden)
        loss = self.logits.compare(batch, own, above)
        self.parts = dict(self.logits.parts)
        if not self.matched:
            return loss
        states = self._states_loss(batch, own.hidden, target)
        alpha = _ratio(self.parts["logits"], states)
        self.parts["alpha"] = alpha
        return loss + alpha * (states - states.detach())  # the gradient, not the value

    def _targets(self, hidden: States) -> dict[str, Tensor]:
        """The teacher's side of H, float32 [B, S, H], by stack.layer."""
        return {f"{k}.{above}": hidden[k][above].detach().float() for k, above, _ in self.matched}

    def _states_loss(
        self, batch: dict[str, Tensor], hidden: States, target: dict[str, Tensor]
    ) -> Tensor:
        """L_is: the sum over H of the mean cosine distance of real tokens."""
        masks, terms = real_positions(self.student, batch, hidden), []
        for stack, above, below in self.matched:
            real = masks[stack]
            own_NH = self.lift(hidden[stack][below][real]).float()
            cosine_N = cosine_similarity(own_NH, target[f"{stack}.{above}"][real], dim=-1)
            terms.append((1 - cosine_N).sum() / tokens_of(real))
            name = "block output" if below else "embeddings"
            self.parts[name] = self.parts.get(name, 0) + terms[-1].detach()
        return torch.stack(terms).sum()


def _ratio(logits: Tensor, states: Tensor) -> Tensor:
    """alpha, of the whole batch however many processes share it."""
    means = [logits.detach().clone(), states.detach().clone()]
    team().average(means)
    return means[0] / means[1].clamp(min=_SMALLEST)
