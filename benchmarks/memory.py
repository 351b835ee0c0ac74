"""Peak memory of loading, saving, quantizing and exporting, and of the chunked KL.

    python benchmarks/memory.py [--only 0.03M|6M|60M|250M|1B|kl]

Llamas of random weights from 0.03M to 1B parameters. Every cell is measured in a process of its
own (benchmarks/memory_worker.py), with one thread, appended to docs/results/memory.jsonl when it
is done and skipped when it is there; docs/results/memory.md is made from all of them. 1B needs
10 GB of memory and 14 GB of disk below TMPDIR.
"""

import argparse
import multiprocessing
import tempfile
from functools import partial

import memory_worker
import torch
from cells import Cells, table

SIZES = tuple(memory_worker.SIZES)
ACTIONS = (
    *("load float32", "load float32, transformers"),
    *("load bfloat16", "load bfloat16, transformers"),
    *("save float32", "save float32, transformers"),
    *("save bfloat16", "save bfloat16, transformers"),
    *("save and prove float32", "save and prove bfloat16"),
    *("quantize int4", "save int4", "load int4", "export safetensors"),
)
KL = ("chunked", "naive")
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
the same loss written on full logits. Extra peak of resident memory in MB; gradients exist before.

The chunked loss finds gradients together with the loss, 2^20 logits or 64 tokens at a time, and
keeps no graph over logits. What still grows with the vocabulary is the gradient of the head,
vocabulary x width whatever the length; with the length, the states of the backbone. In brackets:
seconds of one pass, on one thread."""


def checkpoint_cells(size, cells):
    """All actions on one size; its checkpoints are made once, and deleted again."""
    missing = [action for action in ACTIONS if f"{size} {action}" not in cells.found]
    if not missing:
        print(f"{size}: present, skipped")
        return
    with tempfile.TemporaryDirectory() as tiny, tempfile.TemporaryDirectory() as folder:
        alone(memory_worker.make, "0.03M", tiny)
        made = alone(memory_worker.make, size, folder)
        for action in missing:
            measure = partial(alone, both, action, tiny, folder)
            run(cells, f"{size} {action}", lambda measure=measure: made | measure())


def both(action, tiny, folder):
    """Do it first on the smallest model, so that all code is in memory before the measurement."""
    memory_worker.checkpoint(action, tiny)
    return memory_worker.checkpoint(action, folder)


def kl_cells(cells):
    """The loss with and without chunks, over vocabularies and lengths."""
    for vocabulary in VOCABULARIES:
        for length in LENGTHS:
            for how in KL:
                name = f"kl {how} {vocabulary} {length}"
                if not (how == "naive" and vocabulary * length > 2**27):
                    run(cells, name, partial(alone, memory_worker.kl, how, vocabulary, length))


def alone(measure, *arguments):
    """What a function returns in a process of its own, forked from this one that only imported."""
    # torch rebuilds its thread pool after a fork and crashes where two threads do so at once
    start = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with multiprocessing.get_context("fork").Pool(1, **start) as pool:
        return pool.apply(measure, arguments)


def run(cells, name, measure):
    """A cell, and its outcome on the screen."""
    cell = cells.run(name, measure)
    print(f"  {extra(cell):.0f} MB, {cell['seconds']:.1f} s", flush=True)


def extra(cell):
    """MB beyond the model that a cell needed."""
    new = cell["model"] if " load " in cell["cell"] else 0
    return (cell["peak"] - cell["before"] - new) / 1e6


def page(cells):
    """The results page: command, machine, a table per size, the table of the KL."""
    blocks = ["# Memory of checkpoints and of distillation on logits"]
    blocks += [f"```\n{__doc__.split(chr(10) * 2)[1].strip()}\n```", cells.where(), EXPLAINED]
    for size in SIZES:
        names = {a: f"{size} {a}" for a in ACTIONS}
        found = {a: cells.found[name] for a, name in names.items() if name in cells.found}
        count = next((f", {c['parameters']:,} parameters" for c in found.values()), ": not run")
        blocks += [f"## {size}{count}", *([checkpoint_table(found)] if found else [])]
    blocks += ["## Chunked KL", EXPLAINED_KL, kl_table(cells.found)]
    return "\n\n".join(blocks) + "\n"


def checkpoint_table(found):
    """The actions on one size."""
    rows = []
    for action in ACTIONS:
        if action not in found:
            rows.append([action, "not run", "", "", "", ""])
            continue
        cell = found[action]
        file, seconds = cell["file"] / 1e6, cell["seconds"]
        written = [f"{file:.1f}", f"{file / seconds:.0f}"] if file else ["", ""]
        rows.append([action, f"{cell['model'] / 1e6:.1f}", written[0], f"{extra(cell):.1f}"])
        rows[-1] += [f"{seconds:.2f}", written[1]]
    return table(["action", "model MB", "file MB", "extra MB", "s", "MB/s"], rows)


def kl_table(found):
    """Extra memory per vocabulary and length."""
    rows = []
    for vocabulary in VOCABULARIES:
        for length in LENGTHS:
            cells = [found.get(f"kl {how} {vocabulary} {length}") for how in KL]
            values = [f"{extra(c):.0f} ({c['seconds']:.1f} s)" if c else "not run" for c in cells]
            logits = vocabulary * length * 4 / 1e6
            rows.append([str(vocabulary), str(length), f"{logits:.0f}", *values])
    return table(["vocabulary", "length", "one logits tensor", "chunked", "full logits"], rows)


def main():
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=[*SIZES, "kl"])
    only = parser.parse_args().only
    cells = Cells("memory")
    for size in [only] if only in SIZES else () if only else SIZES:
        checkpoint_cells(size, cells)
    if only in (None, "kl"):
        kl_cells(cells)
    cells.page.write_text(page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
