"""Minitron (arXiv 2407.14679): do its findings hold on models that train in minutes on one core?

    python benchmarks/minitron.py EXPERIMENT [--model MODEL] [--seeds 0 1 2]
    python benchmarks/minitron.py page

MODEL is "stories260K, whole stories" unless given, "stories260K" (the file of stories as it is) or
"novels-llama". Every experiment is a file of its own, benchmarks/minitron_*.py. Cells are appended
to docs/results/minitron.jsonl and skipped where they are there; docs/results/minitron.md is made
from all of them. Training runs in float32 on one thread. Where several seeds were run, ranges are
over seeds, and two arms are called apart only where their ranges do not overlap; of a single seed
the numbers are compared as they are.
"""

import argparse
import importlib

import torch
from cells import Cells
from minitron_lab import MODELS, STORIES

EXPERIMENTS = {
    "zero-shot": "minitron_zero_shot",
    "aggregation": "minitron_aggregation",
    "recovery": "minitron_recovery",
    "longer": "minitron_longer",
    "axes": "minitron_axes",
    "variants": "minitron_variants",
    "search": "minitron_search",
    "encoder": "minitron_encoder",
    "cost": "minitron_cost",
}


def page(cells):
    """What the whole page says: a section for every experiment."""
    minutes = sum(c["cell_seconds"] for c in cells.found.values()) / 60
    blocks = ["# Minitron", *__doc__.strip().split("\n\n"), cells.where()]
    blocks[2] = f"```\n{blocks[2]}\n```"
    blocks.append(f"{len(cells.found)} cells in {minutes:.0f} minutes.")
    for file in EXPERIMENTS.values():
        experiment = importlib.import_module(file)
        said = experiment.__doc__.split("\n\n", 1)
        blocks += [f"## {experiment.TITLE}", said[0], said[1].strip(), *experiment.section(cells)]
    return "\n\n".join(blocks) + "\n"


def main():
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "page"])
    parser.add_argument("--model", choices=MODELS, default=STORIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if args.experiment != "page":
        experiment = importlib.import_module(EXPERIMENTS[args.experiment])
        experiment.run(Cells("minitron"), args.model, args.seeds)
    cells = Cells("minitron")  # read anew: another experiment may have added cells
    cells.page.write_text(page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
