"""Peak memory of loading, saving, quantizing and exporting, and of the chunked KL.

    python benchmarks/memory.py [--only 0.03M|6M|60M|250M|1B|kl]

Llamas of random weights from 0.03M to 1B parameters. Every cell is measured in a process of its
own (benchmarks/memory_worker.py), with one thread, appended to docs/results/memory.jsonl when it
is done and skipped when it is there; docs/results/memory.md is made from all of them. 1B needs
10 GB of memory and 14 GB of disk below TMPDIR.
"""

import argparse
import datetime
import json
import multiprocessing
import tempfile
from pathlib import Path

import memory_worker

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "docs" / "results" / "memory.jsonl"
PAGE = CELLS.with_suffix(".md")
SIZES = tuple(memory_worker.SIZES)
ACTIONS = (
    *("load float32", "load float32, transformers"),
    *("load bfloat16", "load bfloat16, transformers"),
    *("save float32", "save float32, transformers"),
    *("save bfloat16", "save bfloat16, transformers"),
    *("save and prove float32", "save and prove bfloat16"),
    *("quantize int4", "save int4", "load int4", "export safetensors"),
)
VOCABULARIES, LENGTHS = (4096, 32768, 131072), (128, 512, 2048)
EXPLAINED = """\
*model* is the bytes of the weights in memory during the action, *file* the bytes read or written.
*extra* is the peak of resident memory during the action, minus what the process held before, and
for loads minus the model: what the action needs beyond the model itself. It includes the pages of
mapped files. Loads end when every weight was read once; int4 keeps a code in a byte in memory and
packs two into a byte on disk. *save and prove* is what ends a stage: save, give the model back,
load the saved one, compare; its extra can be negative. The quantized model that `quantize` leaves
is smaller than the float model it starts from. Lines with *transformers* are `save_pretrained` and
`from_pretrained(dtype=float32)` of the same weights; to save bfloat16 it is given a cast state.
Seconds are of one run on a shared machine with the files in the page cache: they tell orders of
magnitude, no more."""
EXPLAINED_KL = """\
One forward and backward pass of `distill.kd` (batch 1, a llama of one layer and width 64), beside
the same loss written on full logits. Extra peak memory in MB; gradients exist before. The chunked
loss holds at most 2^22 logits of each model at once, so below that (4096 x 512) it needs what the
full logits need, and above it a constant. What then still grows with the vocabulary is the gradient
of the head, vocabulary x width whatever the length; with the length, the states of the backbone."""


def checkpoint_cells(size, cells):
    """All actions on one size; its checkpoints are made once, and deleted again."""
    missing = [action for action in ACTIONS if f"{size} {action}" not in cells]
    if not missing:
        print(f"{size}: present, skipped")
        return
    with tempfile.TemporaryDirectory() as folder:
        made = alone(memory_worker.make, size, folder)
        for action in missing:
            keep(cells, f"{size} {action}", made | alone(memory_worker.checkpoint, action, folder))


def kl_cells(cells):
    """The loss with and without chunks, over vocabularies and lengths."""
    for vocabulary in VOCABULARIES:
        for length in LENGTHS:
            for how in ("chunked", "naive"):
                name = f"kl {how} {vocabulary} {length}"
                if name not in cells:
                    keep(cells, name, alone(memory_worker.kl, how, vocabulary, length))


def alone(measure, *arguments):
    """What a function returns in a process of its own, forked from this one that only imported."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(memory_worker.warm_up)
        return pool.apply(measure, arguments)


def keep(cells, name, found):
    """Append a finished cell to the file."""
    cells[name] = {"cell": name, "date": datetime.date.today().isoformat()} | found
    with CELLS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(cells[name]) + "\n")
    print(f"{name}: {extra(cells[name]):.0f} MB, {found['seconds']:.1f} s", flush=True)


def extra(cell):
    """MB beyond the model that a cell needed."""
    new = cell["model"] if " load " in cell["cell"] else 0
    return (cell["peak"] - cell["before"] - new) / 1e6


def page(cells):
    """The results page: command, machine, a table per size, the table of the KL."""
    blocks = ["# Memory of checkpoints and of distillation on logits"]
    blocks += [f"```\n{__doc__.split(chr(10) * 2)[1].strip()}\n```", *about(cells), EXPLAINED]
    for size in SIZES:
        found = {a: cells[f"{size} {a}"] for a in ACTIONS if f"{size} {a}" in cells}
        count = next((f", {c['parameters']:,} parameters" for c in found.values()), ": not run")
        blocks += [f"## {size}{count}", *([checkpoint_table(found)] if found else [])]
    blocks += ["## Chunked KL", EXPLAINED_KL, kl_table(cells)]
    return "\n\n".join(blocks) + "\n"


def about(cells):
    """One paragraph per machine and set of versions that the cells come from."""
    found = {}
    for cell in cells.values():
        machine = cell["machine"]
        text = (
            f"{machine['cpu']}, 1 thread, {machine['memory_bytes'] / 2**30:.0f} GiB; "
            + ", ".join(f"{name} {version}" for name, version in cell["packages"].items())
        )
        found.setdefault(text, []).append(cell["date"])
    return [f"{' to '.join(sorted({min(d), max(d)}))}; {text}" for text, d in found.items()]


def checkpoint_table(found):
    """The actions on one size."""
    lines = ["| action | model MB | file MB | extra MB | s | MB/s |", "|---|--:|--:|--:|--:|--:|"]
    for action, cell in found.items():
        file, seconds = cell["file"] / 1e6, cell["seconds"]
        speed = f"{file / seconds:.0f}" if file else ""
        lines.append(
            f"| {action} | {cell['model'] / 1e6:.1f} | {f'{file:.1f}' if file else ''} | "
            f"{extra(cell):.1f} | {seconds:.2f} | {speed} |"
        )
    return "\n".join(lines)


def kl_table(cells):
    """Extra memory per vocabulary and length."""
    lines = ["| vocabulary | length | one logits tensor | chunked | full logits |"]
    lines.append("|--:|--:|--:|--:|--:|")
    for vocabulary in VOCABULARIES:
        for length in LENGTHS:
            names = [f"kl {how} {vocabulary} {length}" for how in ("chunked", "naive")]
            values = [f"{extra(cells[n]):.0f}" if n in cells else "not run" for n in names]
            logits = vocabulary * length * 4 / 1e6
            lines.append(f"| {vocabulary} | {length} | {logits:.0f} | {' | '.join(values)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=[*SIZES, "kl"])
    only = parser.parse_args().only
    lines = CELLS.read_text(encoding="utf-8").splitlines() if CELLS.is_file() else []
    cells = {cell["cell"]: cell for cell in map(json.loads, lines)}
    memory_worker.warm_up()
    for size in [only] if only in SIZES else () if only else SIZES:
        checkpoint_cells(size, cells)
    if only in (None, "kl"):
        kl_cells(cells)
    PAGE.write_text(page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
