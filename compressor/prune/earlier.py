"""Zeros of an earlier stage stay zeros: what a later stage can still do beside them.

One-shot methods take the zeros that are there as part of their share. A method that chooses its
masks while it trains would have nothing left to choose. Shares here are those that
`Model.formats` tells, so an empty model will do.
"""

from compressor.errors import CompressError
from compressor.model.model import Model
from compressor.model.sparse import prunable
from compressor.numerics.masks import fits, implies
from compressor.prune.sparsity import SparseOptions, targets

# Shares this near are one: a row loses a whole number of weights, and some were zero before.
_NEAR = 0.02


def promised_share(model: Model, options: SparseOptions) -> float:
    """Share of the weights that `options` speak of, of which a pattern says they are zero."""
    linears = prunable(model)
    sizes = {
        n: m.weight.numel() for n, m in linears.items() if fits(m.in_features, options.pattern)
    }
    zeros = sum(
        size * model.formats[name].sparsity
        for name, size in sizes.items()
        if name in model.formats and model.formats[name].pattern is not None
    )
    return zeros / max(1, sum(sizes.values()))


def remark(model: Model, options: SparseOptions) -> str:
    """What the user should read of earlier zeros before this stage; "" where there is nothing."""
    had = promised_share(model, options)
    if had > options.share + _NEAR:
        return (
            f"{had:.1%} of the weights are zero already and stay zero, so the {options.share:.1%} "
            "asked for are fewer than there will be"
        )
    patterns = {form.pattern for form in model.formats.values()}
    if had > options.share - _NEAR and patterns == {options.pattern}:
        return f"{had:.1%} of the weights are zero already, as asked for: it makes no new zeros"
    return ""


def refuse_looser(model: Model, options: SparseOptions) -> None:
    """Refuse to choose masks anew where earlier zeros, which stay, leave no choice.

    Raises:
        CompressError: the model has more zeros than are asked for, or a layer has another pattern,
            which implies the one asked for. With the very same pattern it trains on: see `remark`.
    """
    hint = "leave out the stage that pruned before, as this one chooses its masks itself; or ask "
    had, share = promised_share(model, options), options.share
    if had > share + _NEAR:
        raise CompressError(
            f"{had:.1%} of the weights are zero already and stay zero; {share:.1%} ask for fewer",
            f"{hint}for more than {had:.1%}",
        )
    for name in targets(model, options):
        form = model.formats.get(name)
        if form is None or form.pattern is None or implies(options.pattern, form.pattern):
            continue
        if share <= form.sparsity + _NEAR:
            raise CompressError(
                f"'{name}' is {form.pattern} already and its zeros stay zero, so it is "
                f"{options.pattern} too, with no mask to choose",
                f"{hint}for {form.pattern} or stricter",
            )
