"""What learns, at which highest rate, and the optimizer over it."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from compressor.training.options import Train


@runtime_checkable
class HasRates(Protocol):
    """An objective with modules that learn at a highest rate of their own, each under a name.

    What learns at its own rate is another training on the same batches: it is clipped by itself.
    """

    rates: dict[str, tuple[nn.Module, float]]


def weights_of(module: nn.Module, objective: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of all that trains; tied ones once."""
    found = {f"student.{k}": p for k, p in module.named_parameters() if p.requires_grad}
    found |= {f"objective.{k}": p for k, p in objective.named_parameters() if p.requires_grad}
    assert found, "nothing to train"
    assert len({id(p) for p in found.values()}) == len(found), "the objective holds the student"
    assert all(p.dtype == torch.float32 for p in found.values()), "master weights are float32"
    return found


def learners_of(
    weights: dict[str, nn.Parameter], objective: nn.Module, options: Train
) -> list[tuple[float, list[nn.Parameter]]]:
    """(highest learning rate, parameters) of the model and of what learns beside it."""
    found, taken = [], set()
    for module, lr in rates_of(objective).values():
        own = [p for p in module.parameters() if p.requires_grad]
        found.append((lr, own))
        taken |= {id(p) for p in own}
    return [(options.lr, [p for p in weights.values() if id(p) not in taken]), *found]


def rates_of(objective: nn.Module) -> dict[str, tuple[nn.Module, float]]:
    """The modules of an objective that learn at a rate of their own."""
    return objective.rates if isinstance(objective, HasRates) else {}


def adamw(learners: list[tuple[float, list[nn.Parameter]]], options: Train) -> Optimizer:
    """AdamW of all that learns."""
    groups = [
        g for lr, found in learners for g in parameter_groups(found, options.weight_decay, lr)
    ]
    return AdamW(groups, lr=options.lr, betas=options.betas, eps=1e-8)


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, lr: float
) -> list[dict[str, Any]]:
    """Groups of an optimizer: biases and norms do not decay."""
    given = list(parameters)
    kinds = (
        ([p for p in given if p.dim() > 1], weight_decay),
        ([p for p in given if p.dim() <= 1], 0.0),
    )
    return [{"params": found, "weight_decay": decay, "lr": lr} for found, decay in kinds if found]
