"""Every architecture of the family table through pruning, saving and ONNX Runtime.

    python benchmarks/families.py [--only FAMILY] [--check CHECK]

One cell per family and check is appended to docs/results/families.jsonl when it is done and
skipped when it is there; docs/results/families.md is written from all of them. Models are the pico
ones of tests/families.py: random weights, two or three layers.
"""

import argparse
import tempfile
import warnings
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from cells import Cells, table
from picos import CONFIGS, pico, random_inputs, workbench

from compressor.engines.generate import generate
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.engines.torch import TorchEngine
from compressor.export import onnx as export
from compressor.model.budget import TargetSizes
from compressor.model.count import count_parameters
from compressor.model.forward import output_mask, outputs
from compressor.model.model import Model
from compressor.model.probe import largest_difference
from compressor.model.saving import save
from compressor.prune import minitron
from compressor.quantize import rtn
from compressor.run.gate import check_agreement

CHECKS = ("pruned", "float", "int8", "int4", "dynamic")
SHAPES = ((1, 1), (1, 7), (3, 11))
PROMPT, TOTAL = 10, 24  # tokens; the sliding windows of the pico models are 8 wide
QUANTIZATION = {
    "int8": {"bits": 8, "group": 32},
    "int4": {"bits": 4, "group": 32},
    "dynamic": {"bits": 8, "group": None, "activation": "dynamic"},
}


def sizes_of(model):
    """Fewer layers, heads and neurons, and channels as far as the shape rule lets them go."""
    hidden = 16 if model.family.shape_rule == "hidden = heads x head_dim" else 24
    pair = {"decoder_layers": 1} if len(model.family.stacks) > 1 else {}
    return TargetSizes(layers=2, heads=2, hidden=hidden, mlp=32, **pair)


def pruned_pico(name):
    """A pico model after prune.minitron on random data."""
    model = pico(name)
    minitron.run(model, minitron.Options(sizes=sizes_of(model)), workbench(model))
    return model


def check_pruned(name):
    """Prune, save, load with plain transformers: largest difference of the outputs."""
    before, model = pico(name), pruned_pico(name)
    with tempfile.TemporaryDirectory() as out:
        save(model, Path(out), Path(tempfile.mkdtemp()))
        loaded = type(model.module).from_pretrained(out, local_files_only=True).eval()
    batch = random_inputs(model)
    wanted = outputs(model, batch)
    got = outputs(Model(loaded, model.family, None), batch)
    return {
        "parameters": count_parameters(before.module),
        "pruned_parameters": count_parameters(model.module),
        "sizes": model.sizes,
        "difference": max(float((wanted[k] - got[k]).abs().max()) for k in wanted),
    }


def batches(model):
    """The shapes, and the last with its padding on the other side."""
    for rows, length in SHAPES:
        batch = random_inputs(model, rows=3, length=length)
        batch = {key: value[:rows] for key, value in batch.items()}
        if length == 1:
            batch = {k: v.clamp(min=1) if k.endswith("mask") else v for k, v in batch.items()}
        yield batch
    yield {k: v.flip(1) if k.endswith("mask") else v for k, v in batch.items()}


def shape_error(model, engine):
    """Worst relative error of the outputs over real tokens."""
    errors = [
        largest_difference(outputs(model, b), engine.outputs(b), output_mask(b))
        for b in batches(model)
    ]
    return max(error for found in errors for error in found.values())


def step_error(model, engine):
    """A prompt and one-token steps, rows padded in front, against each row alone and whole."""
    pair = len(model.family.stacks) > 1
    prefix = "decoder_" if pair else ""
    batch = random_inputs(model, rows=2, length=TOTAL)
    batch |= {f"{prefix}attention_mask": torch.ones(2, TOTAL, dtype=torch.long)}
    batch[f"{prefix}attention_mask"][1, :3] = 0
    own = [f"{prefix}input_ids", f"{prefix}attention_mask"]
    logits, cache = engine.prefill(batch | {key: batch[key][:, :PROMPT] for key in own})
    found = [logits]
    for i in range(PROMPT, TOTAL):
        logits, cache = engine.decode(batch[own[0]][:, i : i + 1], cache)
        found.append(logits)
    found, worst = torch.cat(found, dim=1), 0.0
    for row in range(2):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        if pair and "attention_mask" in alone:
            real = int(alone["attention_mask"].sum())
            alone |= {k: alone[k][:, :real] for k in ("input_ids", "attention_mask")}
        alone |= {key: alone[key][:, 3 * row :] for key in own}
        wanted, got = outputs(model, alone)["logits"][0], found[row, 3 * row :]
        worst = max(worst, float((got - wanted).norm() / wanted.norm()))
    return worst


def same_text(model, engine):
    """Whether both engines continue a prompt with the same 12 tokens."""
    source = None
    if len(model.family.stacks) > 1:
        source = {k: v[:1] for k, v in random_inputs(model, rows=2).items() if "decoder" not in k}
    first = TorchEngine.of(model, Path("."))
    texts = [generate(e, [5], 12, source=source) for e in (first, engine)]
    return texts[0] == texts[1]


def check_float(name):
    """Export the pruned model: several shapes, steps after a past, greedy text."""
    model = pruned_pico(name)
    generates = model.task in ("causal-lm", "seq2seq-lm", "speech-seq2seq")
    with tempfile.TemporaryDirectory() as out:
        export.run(model, export.Options(), Path(out))
        with closing(OnnxRuntimeEngine(Path(out), threads=1)) as engine:
            return {
                "shapes": shape_error(model, engine),
                "steps": step_error(model, engine) if generates else None,
                "same_text": same_text(model, engine) if generates else None,
            }


def check_quantized(name, check):
    """Quantize a model of one layer (per stack) and export it: the errors of the gate."""
    model = pico(name)
    pair = {"decoder_layers": 1} if len(model.family.stacks) > 1 else {}
    minitron.run(model, minitron.Options(sizes=TargetSizes(layers=1, **pair)), workbench(model))
    rtn.run(model, rtn.Options(uneven="channel", **QUANTIZATION[check]), workbench(model))
    with tempfile.TemporaryDirectory() as out:
        export.run(model, export.Options(), Path(out))
        with closing(OnnxRuntimeEngine(Path(out), threads=1)) as engine:
            found = check_agreement(engine, model.formats.values(), Path(out))
    return {
        "modules": len(model.formats),
        "exact": None if found.exact is None else max(found.exact.errors.values()),
        "served": max(found.served.errors.values()),
        "ok": found.ok,
    }


def run_cell(name, check):
    """One family through one check."""
    if check in QUANTIZATION:
        return {"found": check_quantized(name, check)}
    return {"found": {"pruned": check_pruned, "float": check_float}[check](name)}


def show(value):
    """A number as the table shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.1e}"


COLUMNS = {
    "parameters": ("pruned", "parameters"),
    "pruned": ("pruned", "pruned_parameters"),
    "reload": ("pruned", "difference"),
    "shapes": ("float", "shapes"),
    "steps": ("float", "steps"),
    "same text": ("float", "same_text"),
    "int8": ("int8", "exact"),
    "int4": ("int4", "exact"),
    "int8 served": ("int8", "served"),
    "int4 served": ("int4", "served"),
    "dynamic int8": ("dynamic", "served"),
}


def results(found):
    """One row per family; a cell that was not run says so."""
    rows = []
    for name in CONFIGS:
        cells = {check: found.get(f"{name} {check}") for check in CHECKS}
        row = [
            "not run" if cells[check] is None else show(cells[check]["found"][key])
            for check, key in COLUMNS.values()
        ]
        rows.append([name, *row, f"{sum(seconds(c) for c in cells.values() if c):.0f}"])
    return table(["family", *COLUMNS, "seconds"], rows)


def seconds(cell):
    """Seconds of a cell; the first ones were stored under another key."""
    return cell["cell_seconds"] if "cell_seconds" in cell else cell["seconds"]


LEGEND = """\
- **parameters, pruned**: of the pico model, and after `prune.minitron` took layers, heads, neurons
  and residual channels as far as the family's shape rule allows.
- **reload**: the pruned model saved and loaded by plain transformers, largest absolute difference
  of its outputs.
- **shapes**: the pruned model in ONNX Runtime against torch, worst relative error (norm of the
  difference over the norm, real tokens) over (1, 1), (1, 7) and (3, 11) with rows padded on either
  side; images and sound in batches of 1 and 3.
- **steps**: a prompt of 10 tokens and 14 steps of one token, one row padded in front, against each
  row alone without a cache. Sliding windows (mistral, gemma2, gemma3_text) are 8 tokens wide, so
  the past reaches beyond them.
- **same text**: 12 greedy tokens of `generate` through torch and through ONNX Runtime.
- **int8, int4**: one layer of each stack at full width, weights in groups of 32 (one scale per row
  where 32 does not fit), embeddings and head included, with activations left in float: the gate
  allows 1e-4.
- **served**: the same files as they are served, activations rounded to 8 bits per block; **dynamic
  int8** rounds activations once per tensor, in torch too, and is off where a sum one ulp away moves
  an activation to the next code (0: none did). The gate allows 1e-1. Errors of the probe's batches.
- **seconds**: all checks of a family, on a core that other work shared: an upper bound."""


def page(cells):
    """The results page."""
    blocks = [
        "# Families: pruning, saving and ONNX Runtime",
        "```\npython benchmarks/families.py\n```",
        *(cells.where(), results(cells.found), LEGEND),
    ]
    return "\n\n".join(blocks) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=CONFIGS)
    parser.add_argument("--check", choices=CHECKS)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cells = Cells("families")
    for check in [chosen.check] if chosen.check else CHECKS:
        for name in [chosen.only] if chosen.only else CONFIGS:
            cell = cells.run(f"{name} {check}", partial(run_cell, name, check))
            print(f"  {cell['found']}", flush=True)
            cells.page.write_text(page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
