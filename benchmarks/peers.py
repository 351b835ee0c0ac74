"""Ask llm-compressor, in an environment of its own, to quantize a model and score it."""

import json
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from cells import ROOT
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

PEER = os.environ.get("COMPRESS_PEER")  # its Python; see peer_llm_compressor.py
LOG = Path(tempfile.gettempdir(), "compress-peer.log")
SCRIPT = ROOT / "benchmarks" / "peer_llm_compressor.py"


@cache
def _process():
    """The peer, started when first asked: it takes half a minute to be imported."""
    return subprocess.Popen(
        [str(PEER), str(SCRIPT)],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": LOG.open("w")},
        **{"text": True, "env": {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}},
        cwd=tempfile.gettempdir(),
    )


def fresh():
    """End the peer, so that the next question is answered by a new process."""
    if _process.cache_info().currsize:
        _process().kill()
        _process.cache_clear()


def ask(job, calibration, heldout=None):
    """(facts, scores): what the peer measured, and its loss [1] or embeddings [N, H].

    Args:
        job: model, task, method, bits, group, symmetric, activation, ignore, uneven.
        calibration, heldout: {name: rows [N, L]}; without heldout nothing is scored.
    """
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        files = {"calibration": calibration, "heldout": heldout}
        for name, rows in files.items():
            if rows is not None:
                save_file({k: v.contiguous() for k, v in rows.items()}, home / name)
        given = {name: str(home / name) if rows is not None else "" for name, rows in files.items()}
        file = home / "job.json"
        file.write_text(json.dumps(job | given | {"scores": str(home / "scores")}))
        process = _process()
        print(file, file=process.stdin, flush=True)
        while (line := process.stdout.readline()) != f"done {file}\n":
            if not line:
                raise RuntimeError(f"the peer ended: {LOG.read_text()[-2000:]}")
        facts = json.loads(file.with_suffix(".answer").read_text(encoding="utf-8"))
        return facts, load_file(home / "scores")["score"] if heldout is not None else None


def together(batches):
    """One table of rows from batches; shorter ones are padded with 0, as their masks say."""
    batches = [{k: v for k, v in batch.items() if v.dim() == 2} for batch in batches]
    width = max(tensor.shape[1] for batch in batches for tensor in batch.values())
    wide = [{k: pad(v, (0, width - v.shape[1])) for k, v in batch.items()} for batch in batches]
    return {key: torch.cat([batch[key] for batch in wide]) for key in wide[0]}
