"""What pruning makes of a model that has no weights yet: its shapes, or what it promises."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compressor.model.budget import sizes_for
from compressor.model.manifest import WeightFormat
from compressor.model.model import Model
from compressor.model.shapes import empty_model
from compressor.model.shrink import Kept, shrink
from compressor.prune import ast, minitron
from compressor.prune.allocation import AllocatedOptions, exceptions
from compressor.prune.cutting import refuse_formats
from compressor.prune.damage import refuse_unpredictable
from compressor.prune.scores import fitting, layers_to_go
from compressor.prune.sparsity import SparseOptions, kept_pattern, targets


def pruned(model: Model, options: Any) -> Model:
    """The model without its weights, cut by the very code that will cut it, or promised sparse."""
    if isinstance(options, SparseOptions):
        return replace(model, formats=model.formats | _promises(model, options))
    assert isinstance(options, minitron.Options)
    refuse_formats(model)
    refuse_unpredictable(model, options.layer_importance)
    sizes = sizes_for(model.family, model.config, options)
    if options.scores is not None:
        fitting(model, options, options.scores, layers_to_go(model, sizes))
    pruned = replace(model, module=empty_model(type(model.module), model.config))
    shrink(pruned, Kept.first(pruned, sizes), options.rescale)
    return pruned


def _promises(model: Model, options: SparseOptions) -> dict[str, WeightFormat]:
    """The formats that a sparse stage will leave, with the shares that it was told."""
    names = list(targets(model, options))
    uneven = exceptions(options, names) if isinstance(options, AllocatedOptions) else {}
    found = {}
    for name in names:
        before, share = model.formats.get(name, WeightFormat()), uneven.get(name, options.share)
        if share:
            pattern, most = kept_pattern(before, options.pattern), max(share, before.sparsity)
            found[name] = replace(before, pattern=pattern, sparsity=most)
    return found | _side_ranks(model, options, found)


def _side_ranks(
    model: Model, options: SparseOptions, formats: Mapping[str, WeightFormat]
) -> dict[str, WeightFormat]:
    """Those of these formats whose layers get a side path, with its rank."""
    k = options.side if isinstance(options, ast.Options) else None
    found = {}
    for name, form in formats.items():
        inputs: Any = model.module.get_submodule(name).in_features
        if k is not None and inputs % k == 0:
            found[name] = replace(form, side_rank=inputs // k)
    return found
