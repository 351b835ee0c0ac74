"""GPTQ (arXiv 2210.17323) straight from the paper, in float64: what quantize.gptq is held to."""

import torch

from compressor.numerics.quantizer import grid
from compressor.numerics.solver import DAMPING


def by_the_book(w, h, bits, group, symmetric, activation_order, choose=grid):
    """One column after the other, the inverse of what is left made anew; the new weights.

    Grids are what `choose` makes of a group.
    """
    w, h = w.double().clone(), h.double().clone()
    h += DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inputs = len(h)
    width = group or inputs
    order = list(range(inputs))
    if activation_order:
        order = h.diagonal().argsort(descending=True, stable=True).tolist()
    scale, zero = (each.double() for each in choose(w.float(), bits, group, symmetric))
    for place, i in enumerate(order):
        if not activation_order and group and i % group == 0:
            found = choose(w[:, i : i + group].float(), bits, None, symmetric)
            scale[:, i // group], zero[:, i // group] = (each.double()[:, 0] for each in found)
        left = order[place:]
        inverse = h[left][:, left].inverse()
        s, z = scale[:, i // width], zero[:, i // width]
        new = ((w[:, i] / s).round() + z).clamp(0, 2**bits - 1).sub(z) * s
        error = (w[:, i] - new) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        w[:, i] = new
    return w
