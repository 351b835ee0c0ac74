"""What a stage refuses of a model that has no weights yet."""

from collections.abc import Iterator
from contextlib import contextmanager

from compressor.errors import CompressError
from compressor.model.model import Model
from compressor.prune import ast, earlier
from compressor.prune.allocation import AllocatedOptions, exceptions
from compressor.prune.sparsity import SparseOptions, targets
from compressor.quantize import gptq
from compressor.run.profile import Stage
from compressor.run.rehearse_formats import check_jointly_sparse
from compressor.training.calibrated import SequenceOptions
from compressor.training.reading import most_tokens


@contextmanager
def named(where: str) -> Iterator[None]:
    """Say where in the profile it was that something was refused."""
    try:
        yield
    except CompressError as error:
        raise CompressError(f"{where}: {error.what}", error.hint) from error


def check_known(where: str, stage: Stage, model: Model) -> None:
    """Refuse a stage that does not know an architecture of ours."""
    known, kind = model.family.methods, model.family.model_type
    if known and stage.kind != "export" and stage.method not in known:
        raise CompressError(
            f"{where} ({stage.method}) does not know the layers of a {kind}",
            f"what does: {', '.join(known)}, and exports",
        )


def check_length(where: str, stage: Stage, model: Model) -> None:
    """Refuse rows of text that are longer than the model takes."""
    lengths = {}
    if stage.kind == "prune":
        lengths["length"] = getattr(stage.options, "length", None) or 0
    if stage.trains:
        lengths["train.length"] = stage.options.train.length
    most = most_tokens(model.config)
    for option, length in lengths.items():
        if most is not None and length > most:
            raise CompressError(
                f"{where} ({stage.method}): {option} is {length} and the model takes at most "
                f"{most} tokens",
                f"set {where}.{option} to {most} or less",
            )


def check_sparse(where: str, stage: Stage, model: Model) -> None:
    """Refuse what does not fit a layer: patterns, globs, rows, and zeros that are there already."""
    own = stage.options
    try:
        found = list(targets(model, own)) if isinstance(own, SparseOptions) else []
        if isinstance(own, gptq.Options) and own.sparse is not None:
            check_jointly_sparse(model, own.sparse)
        if isinstance(own, AllocatedOptions):
            exceptions(own, found)
        if isinstance(own, SequenceOptions):
            own.tokens(model.config)
        if isinstance(own, ast.Options):
            earlier.refuse_looser(model, own)
    except CompressError as error:
        raise CompressError(f"{where} ({stage.method}): {error.what}", error.hint) from error
