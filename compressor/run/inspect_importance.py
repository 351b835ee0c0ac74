"""`compress inspect --importance`: the scores that a pruning stage left, whole and as tables."""

from dataclasses import asdict
from typing import Any

import torch

from compressor.model.importance_file import read_scores
from compressor.run.tables import Table, facts, significant

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def inspect_importance(path: str) -> dict[str, Any]:
    """All scores of a stage directory or an importance.safetensors file.

    Returns:
        {path, settings, hidden, stacks: [{blocks, removed, layers, windows, heads, cross_heads,
        neurons}]}; windows and cross_heads are null where there are none.

    Raises:
        CompressError: there are no scores, or the file is damaged.
    """
    found = read_scores(path)
    stacks = []
    parts = zip(found.stacks, found.removed, found.importance.stacks, strict=True)
    for blocks, removed, stack in parts:
        lists = {k: None if t is None else t.tolist() for k, t in asdict(stack).items()}
        stacks.append(
            {
                "blocks": blocks,
                "removed": removed,
                "layers": lists["layers_L"],
                "windows": lists["windows_W"],
                "heads": lists["heads_LH"],
                "cross_heads": lists["cross_LH"],
                "neurons": lists["neurons_LM"],
            }
        )
    hidden = found.importance.hidden_D.tolist()
    return {"path": path, "settings": found.settings, "hidden": hidden, "stacks": stacks}


def importance_tables(found: dict[str, Any]) -> list[Table]:
    """What fits on a screen: settings, layers and heads whole, wide axes as quantiles."""
    settings = [(name, facts(value)) for name, value in found["settings"].items()]
    tables = [Table(found["path"], ("", ""), settings, prose=True)]
    for stack in found["stacks"]:
        tables += _stack_tables(stack)
    return [*tables, _quantiles("residual channels", [("all layers", found["hidden"])])]


def _stack_tables(stack: dict[str, Any]) -> list[Table]:
    name = stack["blocks"]

    def by_layer(rows: list[list[float]]) -> list[tuple[str, list[float]]]:
        return [(f"layer {i}", row) for i, row in enumerate(rows)]

    layers = [(f"layer {i}", significant(x)) for i, x in enumerate(stack["layers"])]
    tables = [Table(f"{name}: layers", ("", "score"), layers)]
    if stack["windows"]:
        n = len(stack["layers"]) - len(stack["windows"]) + 1
        rows = [(f"{i} .. {i + n - 1}", significant(x)) for i, x in enumerate(stack["windows"])]
        tables.append(Table(f"{name}: windows of {n} layers", ("layers", "score"), rows))
    for key, title in (("heads", "heads"), ("cross_heads", "heads of cross attention")):
        if stack[key]:
            rows = [(label, facts(row)) for label, row in by_layer(stack[key])]
            tables.append(Table(f"{name}: {title}", ("", "scores"), rows, prose=True))
    return [*tables, _quantiles(f"{name}: neurons", by_layer(stack["neurons"]))]


def _quantiles(title: str, rows: list[tuple[str, list[float]]]) -> Table:
    header = ("", *(f"{100 * q:g} %" for q in _QUANTILES))
    return Table(
        f"{title}, quantiles of their scores",
        header,
        [
            (label, *(significant(x) for x in torch.tensor(row).quantile(places).tolist()))
            for places in [torch.tensor(_QUANTILES)]
            for label, row in rows
        ],
    )
