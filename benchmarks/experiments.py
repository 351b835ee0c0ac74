"""A results page made of experiments: run one, or write the page of all cells there are.

An experiment is a file with TITLE, run(cells, model, seeds) and section(cells); its docstring opens
its section.
"""

import argparse
import importlib

import torch
from cells import Cells
from lab import MODELS, STORIES


def page(cells, title, doc, files):
    """What the whole page says: a section for every experiment."""
    minutes = sum(c["cell_seconds"] for c in cells.found.values()) / 60
    blocks = [f"# {title}", *doc.strip().split("\n\n"), cells.where()]
    blocks[2] = f"```\n{blocks[2]}\n```"
    blocks.append(f"{len(cells.found)} cells in {minutes:.0f} minutes.")
    for file in files:
        experiment = importlib.import_module(file)
        said = experiment.__doc__.split("\n\n", 1)
        blocks += [f"## {experiment.TITLE}", said[0], said[1].strip(), *experiment.section(cells)]
    return "\n\n".join(blocks) + "\n"


def main(name, title, doc, experiments, opening=()):
    """Command line of a page: EXPERIMENT or `page`; an experiment may name its MODELS.

    Args:
        name: docs/results/`name`.jsonl holds the cells.
        experiments: {name: file}.
        opening: files of sections that come before them, which run nothing.
    """
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("experiment", choices=[*experiments, "page"])
    parser.add_argument("--model", help="the experiment's first unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if args.experiment != "page":
        experiment = importlib.import_module(experiments[args.experiment])
        known = list(getattr(experiment, "MODELS", (STORIES, *MODELS)))
        model = args.model or known[0]
        if model not in known:
            parser.error(f"--model {model}: one of {', '.join(known)}")
        experiment.run(Cells(name), model, args.seeds)
    cells = Cells(name)  # read anew: another experiment may have added cells
    cells.page.write_text(
        page(cells, title, doc, [*opening, *experiments.values()]), encoding="utf-8"
    )
