"""GPT-2's Conv1D is a Linear stored with inputs first. In memory it becomes an ordinary nn.Linear.

Everything else then sees one kind of layer; only reading and writing a checkpoint turn the
matrix. The names to turn are asked of an empty model of the same class, so nothing is marked.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def to_linear(module: nn.Module, make: Callable[[Tensor], Tensor] = Tensor.contiguous) -> nn.Module:
    """Replace every Conv1D [I, O] by a Linear [O, I], in place; biases stay.

    Args:
        make: gives the turned weight a place of its own.
    """
    from transformers.pytorch_utils import Conv1D

    for name, found in list(module.named_modules()):
        if isinstance(found, Conv1D):
            inputs, outputs = found.weight.shape
            with torch.device("meta"):
                linear = nn.Linear(inputs, outputs)
            linear.weight = nn.Parameter(make(found.weight.data.t()))
            linear.bias = found.bias
            module.set_submodule(name, linear.train(found.training))
    return module


def turned_names(module: Any) -> frozenset[str]:
    """Names of the weights that a checkpoint of this model's class stores with inputs first."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        raw = type(module)(module.config)
    return frozenset(f"{n}.weight" for n, m in raw.named_modules() if isinstance(m, Conv1D))
