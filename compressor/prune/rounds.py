"""What a round of sparse finetuning starts from, kept on disk: a stopped run keeps its masks.

One file, `round-N/start.safetensors`: all weights after the one-shot method, zeros included, with
the formats, the notes and the identity of the run in its metadata. It is written under another
name, flushed and renamed. A file of another run, or with other content than it was written with,
is not used; then everything is pruned and trained anew, and the log says so.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressor.model.manifest import WeightFormat
from compressor.model.model import Model
from compressor.training.snapshot import digest, flush
from compressor.training.workbench import Workbench

_FOLDER, _NAME, _FACTS = "round-", "start.safetensors", "facts"


def weights(model: Model) -> dict[str, Tensor]:
    """{name: parameter}; tied ones once."""
    return {name: parameter.detach() for name, parameter in model.module.named_parameters()}


def round_folder(work: Workbench, number: int) -> Path:
    """Scratch of round `number`, which counts from 1."""
    return work.scratch / f"{_FOLDER}{number}"


def keep_start(model: Model, identity: str, number: int, work: Workbench) -> None:
    """Keep the model as the start of a round; what earlier rounds left is deleted."""
    folder = round_folder(work, number)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: w.cpu().contiguous() for name, w in weights(model).items()}
    facts = {
        "identity": identity,
        "digest": digest(tensors),
        "formats": {name: asdict(form) for name, form in model.formats.items()},
        "notes": model.notes,
    }
    partial = folder / f"{_NAME}.partial"
    save_file(tensors, partial, {_FACTS: json.dumps(facts)})
    flush(partial)
    partial.rename(folder / _NAME)
    flush(folder)
    for before in range(1, number):
        shutil.rmtree(round_folder(work, before), ignore_errors=True)


def restore_start(model: Model, identity: str, rounds: int, work: Workbench) -> int:
    """Put the last start of this very run into the model; its round, or 0 where there is none."""
    found = [n for n in range(rounds, 0, -1) if (round_folder(work, n) / _NAME).is_file()]
    if not found:
        return 0
    if _read(model, identity, round_folder(work, found[0]) / _NAME):
        work.log(f"round {found[0]} goes on with the masks it had")
        return found[0]
    work.log("the masks in scratch are of another run, or damaged: pruning anew")
    for number in found:
        shutil.rmtree(round_folder(work, number))
    return 0


@torch.no_grad()
def _read(model: Model, identity: str, file: Path) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            facts = json.loads(opened.metadata()[_FACTS])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return False
    own = weights(model)
    ordered = {name: tensors[name] for name in own if name in tensors}
    if facts["identity"] != identity or digest(ordered) != facts["digest"]:
        return False
    for name, weight in own.items():
        weight.copy_(tensors[name])
    model.formats = {name: WeightFormat(**form) for name, form in facts["formats"].items()}
    model.notes = facts["notes"]
    return True
