"""How many weights a model has, float or quantized; a tied tensor counts once."""

from collections.abc import Iterator

from torch import Tensor, nn

from compressor.model.layers import QuantEmbedding
from compressor.model.tables import QuantTable


def weights(module: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """(owner, tensor) of every distinct parameter and every distinct table of codes."""
    seen: set[int] = set()
    for owner in module.modules():
        own = list(owner.parameters(recurse=False))
        if isinstance(owner, QuantTable):
            own.append(owner.codes_OI)  # type: ignore[arg-type]
        for tensor in own:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield owner, tensor


def count_parameters(module: nn.Module) -> int:
    """Weights of a model; a quantized weight counts as one."""
    return sum(tensor.numel() for _, tensor in weights(module))


def count_embedding_parameters(module: nn.Module) -> int:
    """Weights that sit in embedding tables."""
    tables = (nn.Embedding, QuantEmbedding)
    return sum(tensor.numel() for owner, tensor in weights(module) if isinstance(owner, tables))


def count_nonzero(module: nn.Module) -> int:
    """Weights that are not zero; a code equal to its zero point is zero."""
    total = 0
    for owner, tensor in weights(module):
        if isinstance(owner, QuantTable) and tensor is owner.codes_OI:
            total += int(owner.weight.count_nonzero())
        else:
            total += int(tensor.count_nonzero())
    return total
