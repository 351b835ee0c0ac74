"""How tokens relate to each other in q, k and v: the fine-grained distillation of QSD.

    G(X) = X X^T / ||X X^T||_F                 X [N, C] of one image: q, k or v of one layer
    L = sum over layers, over q, k, v, of ||G(X_s) - G(X_a)||_F           mean over images

Reconstructed: the code of this part of QSD (arXiv 2501.13492) is not public. Its figure links q-q,
k-k and v-v of every layer with those of the full-precision network; the formula is that of related
work. Of the spiking network we take what a neuron is about to fire (its membrane potential behind
the norm), a mean over time steps. Widths and heads of both may differ, tokens and layers may not.

Legend: B rows, N tokens, C channels, T time steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compressor.model.model import Model

_SPIKING = ("attention.q_neuron.norm", "attention.k_neuron.norm", "attention.v_neuron.norm")


def relation_modules(model: Model) -> list[nn.Module]:
    """The modules whose outputs [B, N, C] are q, k and v of every layer."""
    stack = model.family.stacks[0]
    spiking = model.family.model_type == "qsd_transformer"
    paths = _SPIKING if spiking else stack.qkv
    return [block.get_submodule(path) for block in model.blocks(stack) for path in paths]


@contextmanager
def outputs_kept(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What modules give, in the order in which they run, until the block ends."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        found.append(output)

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def relation_loss(own: Sequence[Tensor], above: Sequence[Tensor], images: int) -> Tensor:
    """The loss of paired outputs of B images, [T B, N, C] with time steps of each network's own."""
    terms = []
    for pair in zip(own, above, strict=True):
        x_BNC, target_BNC = (x.unflatten(0, (-1, images)).mean(dim=0) for x in pair)
        difference = relation(x_BNC) - relation(target_BNC)
        terms.append(torch.linalg.matrix_norm(difference).mean())
    return torch.stack(terms).sum()


def relation(x_BNC: Tensor) -> Tensor:
    """G(X) of every image [B, N, N], float32."""
    gram_BNN = x_BNC.float() @ x_BNC.float().transpose(1, 2)
    return gram_BNN / torch.linalg.matrix_norm(gram_BNN, keepdim=True).clamp(min=1e-12)
