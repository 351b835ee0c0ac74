"""Divergences between teacher and student distributions, and cross-entropy, per token.

    p = softmax(z / T);  loss = T^2 * D,  D one of
    forward   KL(p_t || p_s)
    reverse   KL(p_s || p_t)
    js        beta KL(p_t || m) + (1 - beta) KL(p_s || m),   m = beta p_t + (1 - beta) p_s

`js` is the generalised Jensen-Shannon divergence of arXiv 2306.13649; beta = 1/2 is the usual
one. `chunked` averages any of them over real tokens without ever holding the logits of all
tokens: the head is applied to a chunk at a time, and gradients are found on the spot.

Legend: N tokens, V vocabulary, D hidden size. Everything is float32 whatever autocast says.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from compressor.model.model import Model
from compressor.training.parallel import team

Kind = Literal["forward", "reverse", "js"]
Loss = Callable[[Tensor, Tensor], Tensor]  # logits_s [N, V], logits_t [N, V] -> [N]
_LOGITS_AT_ONCE = 2**20  # of one model: 4 MiB in float32, which the C library reuses well
_FEWEST = 64  # tokens of a chunk: each one adds a gradient as large as the head


def divergence(kind: Kind, temperature: float = 1.0, beta: float = 0.5) -> Loss:
    """The loss of one token: (logits_s [N, V], logits_t [N, V]) -> [N], float32, in nats.

    Args:
        kind: forward, reverse or js.
        temperature: T; the loss carries the factor T^2, which keeps gradients of one size.
        beta: share of the teacher in the mixture of js, between 0 and 1, both excluded.
    """
    assert temperature > 0 and 0 < beta < 1
    return partial(_divergence, kind, temperature, beta)


def _divergence(
    kind: Kind, temperature: float, beta: float, logits_s: Tensor, logits_t: Tensor
) -> Tensor:
    s_NV = (logits_s.float() / temperature).log_softmax(dim=-1)
    t_NV = (logits_t.float() / temperature).log_softmax(dim=-1)
    if kind == "forward":
        loss_N = _kl(t_NV, s_NV)
    elif kind == "reverse":
        loss_N = _kl(s_NV, t_NV)
    else:
        m_NV = torch.logaddexp(t_NV + math.log(beta), s_NV + math.log(1 - beta))
        loss_N = beta * _kl(t_NV, m_NV) + (1 - beta) * _kl(s_NV, m_NV)
    return temperature**2 * loss_N


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p || q) [N] of log-probabilities."""
    return (p_NV.exp() * (p_NV - q_NV)).sum(dim=-1)


def truncated_kl(
    logits_s: Tensor, index_NK: Tensor, log_p_NK: Tensor, temperature: float = 1.0
) -> Tensor:
    """T^2 KL(p~_t || p_s) [N], p~_t being the teacher's distribution over K tokens alone.

    Args:
        logits_s: of the student [N, V]; its distribution is over all tokens.
        index_NK: ids of the K tokens, int64.
        log_p_NK: what the teacher gives them, up to a constant for each position.
        temperature: T.
    """
    s_NV = (logits_s.float() / temperature).log_softmax(dim=-1)
    t_NK = (log_p_NK.float() / temperature).log_softmax(dim=-1)
    return temperature**2 * _kl(t_NK, s_NV.gather(-1, index_NK))


def label_loss(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy with the labels [N], float32, in nats."""
    return cross_entropy(logits_NV.float(), targets_N, reduction="none")


def chunked(
    loss: Callable[..., Tensor],
    streams: Sequence[Tensor],
    mask: Tensor,
    chunk: int,
    weights: Sequence[Tensor] = (),
) -> Tensor:
    """Mean of `loss` over the tokens of a mask, `chunk` tokens at a time.

    Gradients are computed together with the loss, chunk by chunk, so that neither the logits of
    a batch nor a graph over them ever exist, and no head is applied a second time.

    Args:
        loss: takes a chunk [n, ...] of every stream and returns [n]; it applies the heads.
        streams: tensors [..., D] or [...] that share the leading shape of `mask`.
        mask: tokens that count.
        chunk: tokens of one chunk; the result does not depend on it.
        weights: parameters inside `loss`; only these get a gradient, and none without gradients.

    Returns:
        A scalar. Memory is that of one chunk and of two gradients of every stream and weight.
    """
    keep = mask.bool()
    real = [stream[keep] for stream in streams]
    assert len(real[0]) > 0, "no token counts"
    trained = weights if torch.is_grad_enabled() else ()
    total: Any = _Chunks.apply(loss, chunk, len(real), *real, *trained)
    return total / tokens_of(mask)


def tokens_of(mask: Tensor) -> Tensor:
    """Tokens that count, float32: what a sum over this process's tokens is divided by.

    Rows of several processes count by their tokens, not by process, so it is the mean of theirs.
    """
    count = mask.sum().float()
    team().average([count])
    return count


class _Chunks(torch.autograd.Function):
    """Sum of a loss over chunks of tokens; `backward` only scales the gradients found forward."""

    @staticmethod
    def forward(
        ctx: Any, loss: Callable[..., Tensor], chunk: int, count: int, *tensors: Tensor
    ) -> Tensor:
        wanted = [i for i in range(len(tensors)) if ctx.needs_input_grad[3 + i]]
        gradients = {i: torch.zeros_like(tensors[i]) for i in wanted}
        total = tensors[0].new_zeros((), dtype=torch.float32)
        for start in range(0, len(tensors[0]), chunk):
            rows = slice(start, start + chunk)
            part = [
                t[rows].detach().requires_grad_(i in wanted) for i, t in enumerate(tensors[:count])
            ]
            with torch.set_grad_enabled(bool(wanted)):
                value = loss(*part).sum()
            total += value.detach()
            leaves = [part[i] if i < count else tensors[i] for i in wanted]
            for i, found in zip(wanted, _gradients(value, leaves), strict=True):
                if i < count:
                    gradients[i][rows] = found
                else:
                    gradients[i] += found
                found = None  # else it would live beside the next chunk's
        ctx.size = 3 + len(tensors)
        ctx.places = [3 + i for i in wanted]
        ctx.save_for_backward(*gradients.values())
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        found: list[Tensor | None] = [None] * ctx.size
        for place, gradient in zip(ctx.places, ctx.saved_tensors, strict=True):
            found[place] = gradient * upstream[0]
        return tuple(found)


def _gradients(value: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(value, leaves) if leaves else ()


def chunk_of(vocabulary: int) -> int:
    """Tokens whose logits are held at once."""
    return max(_FEWEST, _LOGITS_AT_ONCE // vocabulary)


def head_of(model: Model) -> Callable[[Tensor], Tensor]:
    """The output head of a causal language model: hidden [N, D] -> logits [N, V].

    With its bias, and with the soft cap c tanh(z / c) of configs that have
    `final_logit_softcapping`.
    """
    module: Any = model.module
    head = module.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)

    def logits(hidden_ND: Tensor) -> Tensor:
        z_NV = head(hidden_ND)
        return z_NV if cap is None else cap * torch.tanh(z_NV / cap)

    return logits
