"""Divergences between teacher and student distributions, and cross-entropy, per token.

    p = softmax(z / T);  loss = T^2 * D,  D one of
    forward   KL(p_t || p_s)
    reverse   KL(p_s || p_t)
    js        beta KL(p_t || m) + (1 - beta) KL(p_s || m),   m = beta p_t + (1 - beta) p_s

`js` is the generalised Jensen-Shannon divergence of arXiv 2306.13649; beta = 1/2 is the usual
one. `chunked` averages any of them over real tokens without ever holding the logits of all
tokens: the head is applied to a chunk at a time, and again in the backward pass.

Legend: N tokens, V vocabulary, D hidden size. Everything is float32 whatever autocast says.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from compressor.model.model import Model

Kind = Literal["forward", "reverse", "js"]
Loss = Callable[[Tensor, Tensor], Tensor]  # logits_s [N, V], logits_t [N, V] -> [N]
_LOGITS_AT_ONCE = 2**22  # of one model: 16 MiB in float32


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


def label_loss(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy with the labels [N], float32, in nats."""
    return cross_entropy(logits_NV.float(), targets_N, reduction="none")


def chunked(
    loss: Callable[..., Tensor], streams: Sequence[Tensor], mask: Tensor, chunk: int
) -> Tensor:
    """Mean of `loss` over the tokens of a mask, `chunk` tokens at a time, recomputed backward.

    Args:
        loss: takes a chunk [n, ...] of every stream and returns [n]; it applies the heads.
        streams: tensors [..., D] or [...] that share the leading shape of `mask`.
        mask: tokens that count.
        chunk: tokens of one chunk; the result does not depend on it.

    Returns:
        A scalar. Allocated at one time is what one chunk needs, forward and backward; how much
        of it a C library keeps between chunks is its affair (docs/results/memory.md).
    """
    keep = mask.bool()
    real = [stream[keep] for stream in streams]
    assert len(real[0]) > 0, "no token counts"
    parts = zip(*(stream.split(chunk) for stream in real), strict=True)
    sums = [checkpoint(_sum_of, loss, *part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum() / len(real[0])


def _sum_of(loss: Callable[..., Tensor], *part: Tensor) -> Tensor:
    return loss(*part).sum()


def chunk_of(vocabulary: int) -> int:
    """Tokens whose logits are held at once."""
    return max(1, _LOGITS_AT_ONCE // vocabulary)


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
