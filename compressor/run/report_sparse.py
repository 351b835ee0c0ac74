"""What a report says of zeros: where they are, what they cost, and what they gain."""

from typing import Any

from compressor.model.manifest import Manifest, quantized
from compressor.model.sparse import patterns_text
from compressor.run.tables import Table, facts, millions, significant

_WORST = 5  # layers of a stage that are shown


def zeros_sentence(manifests: dict[str, Manifest]) -> str:
    """What zeros gain, where the last of these stages has some; "" where it has none, or is packed.

    Args:
        manifests: {stage: its manifest}, in order.
    """
    name, last = list(manifests.items())[-1]
    patterns = patterns_text(last.formats)
    if not patterns or "packed" in last.metrics:
        return ""
    said = (
        f"{name} is sparse: {patterns}. Its zeros are stored like other weights, so it is not "
        "smaller for them, and not faster without a sparse kernel."
    )
    checkpoints = [stage for stage, m in manifests.items() if m.kind == "checkpoint"]
    if not checkpoints or quantized(manifests[checkpoints[-1]].formats):
        return said
    return (
        f"{said} `compress export DIR/{checkpoints[-1]} --to safetensors --set packed=true --out "
        "PACKED` stores it without them."
    )


def pruned_layers(report: dict[str, Any]) -> Table:
    """Of every one-shot stage the layers whose output it changed most."""
    rows = []
    for stage in report["stages"]:
        noted = (stage.get("notes") or {}).get("sparsity") or {}
        found = {k: v.get("error", v.get("estimated_error")) for k, v in noted.items()}
        known = [layer for layer, error in found.items() if error is not None]
        for layer in sorted(known, key=lambda name: -found[name])[:_WORST]:
            zeros = f"{noted[layer]['sparsity']:.1%}"
            rows.append((stage["name"], layer, zeros, significant(found[layer])))
    header = ("stage", "layer", "zeros", "relative square error")
    return Table("Layers whose output pruning changed most", header, rows, prose=True)


def sparse_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the zeros of each sparse stage are, and layers that took more damping than usual."""
    rows = []
    for stage in report["stages"]:
        if stage.get("patterns"):
            left = f"{millions(stage['nonzero_parameters'])} not zero"
            rows.append((f"{stage['name']}, zeros", f"{stage['patterns']}; {left}"))
        if damped := (stage.get("notes") or {}).get("damping"):
            rows.append((f"{stage['name']}, damping", facts(damped)))
    return rows
