"""Which modules a quantizer replaces and whether its groups fit; weights are not looked at."""

from collections.abc import Sequence

from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model.layers import embedding_factor
from compressor.model.model import CLASSIFIERS, Model


def quantizable(model: Model, embeddings: bool, head: bool) -> list[list[str]]:
    """Names of the modules to quantize; those that share one weight stand together.

    Args:
        embeddings: whether the tables that write the residual stream are quantized. Those that
            do more than look up (some position tables) stay float, as do T5's position biases.
        head: whether what gives the answer is: the output projection of a language model, or
            the last layer of a classifier.

    Raises:
        CompressError: only one of a tied embedding and head is to be quantized.
    """
    heads = _heads(model)
    tied: dict[int, list[str]] = {}
    skipped: set[int] = set()
    tables = _tables(model)
    for name, layer in model.module.named_modules():
        if not isinstance(layer, nn.Linear | nn.Embedding):
            continue
        if isinstance(layer, nn.Embedding) and id(layer.weight) not in tables:
            continue
        wanted = embeddings if isinstance(layer, nn.Embedding) else True
        wanted = head if layer in heads else wanted
        tied.setdefault(id(layer.weight), []).append(name)
        if not wanted:
            skipped.add(id(layer.weight))
    for key in skipped:
        if len(tied[key]) > 1 and embeddings != head:
            raise CompressError(
                f"{' and '.join(tied[key])} share one table, which is quantized whole or not",
                "set embeddings and head both to true or both to false",
            )
    return [names for key, names in tied.items() if key not in skipped]


def is_table(model: Model, names: Sequence[str]) -> bool:
    """Whether modules that share a weight are an embedding, a head, or both."""
    found, heads = [model.module.get_submodule(name) for name in names], _heads(model)
    return any(isinstance(m, nn.Embedding) or m in heads for m in found)


def _heads(model: Model) -> list[nn.Module]:
    """What gives the answer; a DeiT with a teacher has two."""
    if model.task not in CLASSIFIERS:
        projection = model.module.get_output_embeddings()  # type: ignore[operator]
        return [] if projection is None else [projection]
    inside, labels = set(model.base.modules()), model.config.num_labels
    linears = [m for m in model.module.modules() if isinstance(m, nn.Linear) and m not in inside]
    return [linear for linear in linears if linear.out_features == labels]


def _tables(model: Model) -> set[int]:
    """Identities of the embedding weights that can be quantized."""
    found = [model.base.get_submodule(name) for name in model.family.embeddings]
    return {id(table.weight) for table in found if embedding_factor(table) is not None}


def refuse_uneven(model: Model, targets: list[list[str]], group: int | None) -> None:
    """Refuse a group that does not divide the inputs of every target.

    Raises:
        CompressError: names the first layer and the groups that fit it.
    """
    for name in (names[0] for names in targets):
        weight = model.module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        inputs = weight.shape[1]
        if group is None or inputs % group == 0:
            continue
        fitting = [g for g in range(2, inputs + 1) if inputs % g == 0]
        near = sorted(sorted(fitting, key=lambda g: abs(g - group))[:2])
        raise CompressError(
            f"group {group} does not divide the {inputs} inputs of '{name}'",
            f"group: {' or '.join(map(str, near))} fits it, and uneven: channel gives such layers "
            "one scale per output channel",
        )
