"""The main job on three real models: the demo encoder and two Llama decoders.

    python benchmarks/first_run.py [--only demo|stories260K|novels-llama]

Runs `compress run` as a user would, appends one cell per model to docs/results/first-run.jsonl
when it is done, skips cells that are there, and writes docs/results/first-run.md from all of them.
About 8 minutes for the demo and 5 to 15 for each decoder on two free cores.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from cells import DATA, Cells, place

import compressor
from compressor.model.checkpoint import load_processor

COMMANDS = {
    "demo": ["run", "demo"],
    "stories260K": [
        *("run", "llama-half-int4", "--model", "$DATA/checkpoints/stories260K"),
        *("--data", "$DATA/data/tinystories.txt"),
        *("--set", "stages.1.multiple=8", "--set", "stages.2.train.steps=1500"),
        *("--set", "stages.2.train.lr=0.002"),
    ],
    "novels-llama": [
        *("run", "llama-half-int4", "--model", "$DATA/checkpoints/novels-llama"),
        *("--data", "$DATA/data/novels.txt", "--set", "stages.2.train.steps=400"),
    ],
}
CAVEATS = {
    "stories260K": "The original may have seen these stories in its own training, so its "
    "perplexity flatters it; agreement with the original does not depend on that.",
    "novels-llama": "The original was trained on this very text, held-out documents included (they "
    "are held out of *our* training), so its perplexity flatters it; agreement with the original "
    "does not depend on that.",
}
PROMPTS = {"stories260K": "Once upon a time, there was a little", "novels-llama": "It was a cold"}


def run_cell(name):
    """Run one command in a fresh directory and return what it left."""
    out = Path(tempfile.mkdtemp()) / name
    command = [part.replace("$DATA", str(DATA)) for part in COMMANDS[name]]
    start = time.perf_counter()
    subprocess.run(
        [str(Path(sys.executable).with_name("compress")), *command, "--out", str(out)], check=True
    )
    seconds = time.perf_counter() - start
    report = (out / "report.md").read_text(encoding="utf-8")
    cell = {
        "command": " ".join(["compress", *COMMANDS[name], "--out", f"out/{name}"]),
        "wall_seconds": round(seconds),
        "report": json.loads((out / "report.json").read_text(encoding="utf-8")),
        "tables": report.partition("## Resolved profile")[0],
        "text": sample(out, PROMPTS[name]) if name in PROMPTS else None,
    }
    shutil.rmtree(out.parent)
    return cell


def sample(out, prompt, tokens=80):
    """Greedy text of the exported model through ONNX Runtime and its cache."""
    path = next(out.glob("*-export.onnx"))
    tokenizer, engine = load_processor(path), compressor.open_engine(path)
    ids = tokenizer(prompt).input_ids
    text = tokenizer.decode(compressor.generate(engine, ids, tokens), skip_special_tokens=True)
    engine.close()
    return text


def page(cells):
    """The results page: per model the command, the machine, the tables, the text."""
    blocks = ["# First run: the main job on three real models", __doc__.split("\n\n")[2].strip()]
    for name in COMMANDS:
        cell = cells.found.get(name)
        blocks.append(f"## {name}")
        if cell is None:
            blocks.append("not run")
            continue
        report = cell["report"]
        blocks += [
            f"```\n{cell['command']}\n```",
            f"{cell['date']}, {cell['wall_seconds']} s in all; "
            + place(report["machine"], report["packages"]),
            cell["tables"].replace("\n## ", "\n### ").partition("\n\n")[2].strip(),
        ]
        if name in CAVEATS:
            blocks.append(f"**Caveat.** {CAVEATS[name]}")
        if cell["text"]:
            blocks.append("Greedy text of the exported 4-bit model:\n\n> " + cell["text"].strip())
    return "\n\n".join(blocks) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=COMMANDS)
    only = parser.parse_args().only
    cells = Cells("first-run")
    for name in [only] if only else COMMANDS:
        cells.run(name, partial(run_cell, name))
    cells.page.write_text(page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
