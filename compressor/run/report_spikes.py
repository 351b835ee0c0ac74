"""What spiking networks of a run do for one image, by formula."""

import re
from typing import Any

from compressor.run.tables import MISSING, Table, significant


def spikes(report: dict[str, Any]) -> Table:
    """What spiking networks do for one image, and what their neurons pass on."""
    header = ("stage", "firing", "AC", "MAC", "nJ", "in float", "less")
    header += ("entropy of q, k, v, bits", "untrained, in float")
    noted = _spiking(report)
    rows = [_spikes_row(name, found) for name, found in noted]
    formula = noted[0][1]["formula"] if noted else ""
    return Table(f"Spikes for one image, by formula and not measured: {formula}", header, rows)


def spiking_layers(report: dict[str, Any]) -> Table:
    """How often the neurons of each block fire, and the additions that their spikes cause."""
    rows = []
    for name, found in _spiking(report):
        blocks: dict[str, list[dict[str, float]]] = {}
        for neuron, layer in found["layers"].items():
            numbered = re.match(r".*?\.\d+(?=\.)", neuron)
            blocks.setdefault(numbered.group() if numbered else neuron, []).append(layer)
        for block, layers in blocks.items():
            rates = [layer["firing_rate"] for layer in layers]
            ac = sum(layer["ac"] for layer in layers)
            rows.append((name, block, f"{min(rates):.1%} to {max(rates):.1%}", f"{ac:,.0f}"))
    return Table("Neurons of every block", ("stage", "block", "firing", "AC"), rows, prose=True)


def _spiking(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(stage, what it noted of spikes)."""
    noted = [(s["name"], (s.get("notes") or {}).get("spikes")) for s in report["stages"]]
    return [(name, found) for name, found in noted if found]


def _spikes_row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    own, other = found["energy_nj"], found["float_energy_nj"]
    return (
        *(name, f"{found['firing_rate']:.1%}", f"{found['ac']:,.0f}", f"{found['mac']:,.0f}"),
        *(significant(own), significant(other), f"{other / own:.1f}x"),
        *(_entropy(found["entropy"]), _entropy((found.get("untrained") or {}).get("entropy"))),
    )


def _entropy(bits: dict[str, float] | None) -> str:
    return ", ".join(f"{bits[kind]:.2f}" for kind in "qkv") if bits else MISSING
