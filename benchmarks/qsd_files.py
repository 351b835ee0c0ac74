"""How small the files get: packed checkpoints and ONNX, at the width of the experiment and beyond.

`compress run` with quantize.qsd (one step, for sizes do not depend on training) and export.onnx, of
ViTs of random weights, beside safetensors and export.onnx of the ViT. *Stored* is tensors alone;
files have names as well, and an ONNX file a graph with its constants. Biases, positions, scales
and thresholds stay float. Their share falls with the width, and the ratio rises; 8 and 16 are the
bounds of 4 and 2 bits. One to twelve minutes a cell, most of them for the export that is proven.
"""

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from cells import DATA, table
from qsd_lab import MNIST
from sweep import NOT_RUN

TITLE = "Sizes of files"
MODELS = {
    "MNIST": MNIST[0],
    "ViT-Tiny's shape": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "ViT-Small's shape": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
}
BITS = (4, 2)
PROFILE = """\
name: files
stages:
  - quantize.qsd: {{bits: {bits}, levels: 4, train: {{steps: 1, batch: 2}}}}
  - export.onnx: {{}}
baselines:
  onnx float32: [export.onnx]
measures: [size]
"""


def cell(model, bits):
    """Bytes of what one run leaves."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(**MODELS[model], num_channels=1, num_labels=10)
    with tempfile.TemporaryDirectory() as scratch:
        folder, out, profile = (Path(scratch, name) for name in ("vit", "out", "files.yaml"))
        module = ViTForImageClassification(config)
        module.save_pretrained(folder)
        profile.write_text(PROFILE.format(bits=bits), encoding="utf-8")
        images = DATA / "data" / "t10k-images-idx3-ubyte.gz"
        command = [sys.executable, "-m", "compressor.cli.main", "run", str(profile)]
        where = ["--model", str(folder), "--data", str(images), "--out", str(out)]
        subprocess.run([*command, *where], check=True)
        packed, graph = out / "01-quantize.qsd", out / "02-export.onnx"
        metrics = json.loads((packed / "manifest.json").read_text(encoding="utf-8"))["metrics"]
        return {
            "parameters": sum(p.numel() for p in module.parameters()),
            "vit_file": size(folder, "safetensors"),
            "vit_onnx": size(out / "baselines" / "onnx float32" / "01-export.onnx", "onnx"),
            "stored": metrics["notes"]["size"]["stored_bytes"],
            "file": size(packed, "safetensors"),
            "onnx": size(graph, "onnx"),
        }


def size(folder, kind):
    """Bytes of the files with weights or graphs in a directory, probes left out."""
    names = (file for file in folder.glob(f"*.{kind}*") if file.stem != "probe")
    return sum(file.stat().st_size for file in names)


def key(model, bits):
    return f"files {model} {bits} bits"


def run(cells, model, seeds):
    """Both numbers of bits."""
    for bits in BITS:
        cells.run(key(model, bits), partial(cell, model, bits))


def section(cells):
    """One table."""
    header = ["ViT", "parameters", "weights", "stored kB", "smaller", "file kB", "smaller"]
    rows, missing = [], [NOT_RUN] * 6
    for model in MODELS:
        for bits in BITS:
            found = cells.found.get(key(model, bits))
            rows.append([model, *(_row(found, bits) if found else ["", str(bits), *missing])])
    return [table([*header, "ONNX kB", "smaller"], rows)]


def _row(found, bits):
    floats = 4 * found["parameters"], found["vit_file"], found["vit_onnx"]
    own = [found[name] for name in ("stored", "file", "onnx")]
    pairs = zip(own, floats, strict=True)
    shown = [x for mine, its in pairs for x in (f"{mine / 1000:.0f}", f"{its / mine:.1f}x")]
    return [str(found["parameters"]), str(bits), *shown]
