"""What a run did as tables: stages, checks of the exports, circumstances."""

from typing import Any

from compressor.run.bench_tables import bench_tables
from compressor.run.report_sparse import pruned_layers, sparse_rows
from compressor.run.report_spikes import spikes, spiking_layers
from compressor.run.search_report import search_tables
from compressor.run.tables import (
    FIDELITY,
    MISSING,
    Table,
    clock,
    facts,
    interval,
    megabytes,
    millions,
    significant,
    threads,
)


def stages(report: dict[str, Any]) -> Table:
    """What each stage took against what preflight had planned."""
    header = ("stage", "params", "MB", "weights MB", "planned")
    header += ("time", "planned", "peak MB", "planned")
    rows = [_stage_row(stage) for stage in report["stages"]]
    return Table("Stages", header, rows)


def _stage_row(stage: dict[str, Any]) -> tuple[str, ...]:
    planned = stage.get("planned") or {}
    return (
        str(stage["name"]),
        millions(stage.get("parameters")),
        megabytes(stage.get("bytes")),
        megabytes(stage.get("weight_bytes")),
        megabytes(planned.get("bytes_out")),
        clock(stage.get("seconds")),
        clock(planned.get("seconds")),
        megabytes(stage.get("peak_memory_bytes")),
        megabytes(planned.get("peak_memory_bytes")),
    )


def gates(report: dict[str, Any]) -> Table:
    """The two checks of every export: agreement with our reference, fidelity to the float model."""
    header = ("export", "result", "agreement", "tolerance", "as served", "fidelity")
    rows = [
        (
            str(gate["name"]),
            "passed" if gate["ok"] else "REFUSED",
            facts(gate.get("agreement")),
            facts(gate.get("tolerance")),
            _served((gate.get("differences") or {}).get("served") or {}),
            _fidelity(gate.get("fidelity") or {}),
        )
        for gate in report.get("gates") or []
    ]
    return Table("Checks of the exports", header, rows, prose=True)


def _served(found: dict[str, Any]) -> str:
    """`most likely answer 98.5 %, greedy text 16 of 16` of an artefact with logits."""
    shown = []
    if (same := found.get("top1_agreement")) is not None:
        shown.append(f"most likely answer {same:.1%}")
    if greedy := found.get("greedy"):
        shown.append(f"greedy text {greedy['equal']} of {greedy['tokens']}")
    return ", ".join(shown) or MISSING


def _fidelity(found: dict[str, Any]) -> str:
    """`cosine 0.943 [0.938, 0.951]` from {cosine, cosine_low, cosine_high, ...}."""
    shown = []
    for name in (key for key in FIDELITY if key in found):
        ends = {end: found.get(f"{name}_{end}") for end in ("low", "high")}
        shown.append(f"{name} {interval({'value': found[name]} | ends)}")
    return ", ".join(shown) or MISSING


def circumstances(report: dict[str, Any]) -> Table:
    """Model, machine, packages and seed: what a second run would have to share."""
    machine = report["machine"]
    memory = significant((machine.get("memory_bytes") or 0) / 1e9)
    rows = [_model_row(report["model"])] if "model" in report else []
    rows += [
        ("machine", f"{machine.get('cpu')}, {threads(machine.get('threads'))}, {memory} GB"),
        ("packages", facts(report.get("packages") or {})),
        *((key, facts(report[key])) for key in ("seed", "data", "speed") if key in report),
        ("time of this run", clock(report.get("seconds"))),
    ]
    notes = [(s["name"], _training(s["notes"])) for s in report["stages"] if _trained(s)]
    rows += sparse_rows(report) + notes
    rows += [(f"{s['name']}, size", _coded(s)) for s in report["stages"] if _sized(s)]
    return Table("Circumstances", ("", ""), rows, prose=True)


def _model_row(model: dict[str, Any]) -> tuple[str, str]:
    embedding = millions(model.get("embedding_parameters"))
    total = millions(model.get("parameters"))
    text = f"{model['id']} ({model['family']}, {total} parameters, {embedding} embedding)"
    return "model", text


def _sized(stage: dict[str, Any]) -> bool:
    return "huffman_bytes" in ((stage.get("notes") or {}).get("size") or {})


def _coded(stage: dict[str, Any]) -> str:
    """Bits of a weight and bytes, codes as they are and in a Huffman code.

    Of quantizers that train also by the formula of their paper, which counts 8 bytes a bucket.
    """
    size = stage["notes"]["size"]
    saved = size["weights"] * (size["bits"] - size["huffman_bits"]) / 8
    said = (
        f"{size['bits']:.2f} bits a weight, {size['stored_bytes']:,} bytes stored; in a Huffman "
        f"code {size['huffman_bits']:.2f}, about {size['stored_bytes'] - saved:,.0f}"
    )
    if not _trained(stage):
        return said
    paper = f"{size['bytes']:,.0f} and {size['huffman_bytes']:,.0f} by the formula of 1802.05668"
    return f"{said} ({paper})"


def _trained(stage: dict[str, Any]) -> bool:
    return bool((stage.get("notes") or {}).get("training"))


def _training(notes: dict[str, Any]) -> str:
    """Facts of a training, and what it did to the loss on rows it did not train on."""
    text, found = facts(notes["training"]), notes.get("validation")
    if not found:
        return text
    change = f"{significant(found['before'])} before, {significant(found['after'])} after"
    if without := notes.get("validation_without_side"):
        change += f" ({significant(without['after'])} without side paths)"
    return f"{text}; validation loss {change} ({found['rows']} rows)"


def report_tables(report: dict[str, Any]) -> list[Table]:
    """Every table of a report that has rows, in reading order."""
    bench = report.get("bench")
    found = bench_tables(bench) if bench else []
    found += [stages(report), *search_tables(report), pruned_layers(report), spikes(report)]
    found.append(spiking_layers(report))
    found.append(gates(report))
    found.append(circumstances(report))
    return [table for table in found if table and table.rows]
