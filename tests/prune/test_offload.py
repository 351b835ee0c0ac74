"""offload: the same weights as in memory, and memory that does not grow with the model."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter

from compressor.model.checkpoint import load_directory
from compressor.model.saving import save
from compressor.model.sparse import broken_promise
from compressor.prune import sparsegpt, wanda
from compressor.run.prove import save_and_prove
from families import pico, random_inputs

MB = 1_000_000


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", "float32"), ("gpt2", "bfloat16"), ("t5", "bfloat16")]
)
def test_offload_changes_no_weight(name, dtype, make_work, tmp_path):
    source = pico(name)
    source.source_dtype = dtype
    folder, scratch = tmp_path / "model", tmp_path / "scratch"
    folder.mkdir()
    save(source, folder, folder)
    found = []
    for offload in (False, True):
        for method in (wanda, sparsegpt):
            work = make_work()
            batches = [random_inputs(source, 3, 11, i) for i in range(2)]
            work = replace(work, _batches=lambda split, n, batches=batches, **shape: batches)
            spill = scratch if offload else None
            model = load_directory(folder, None, spill)
            given = {"samples": 16, "pattern": "2:4", "offload": offload}
            method.run(model, TypeAdapter(method.Options).validate_python(given), work)
            state = {key: x.clone() for key, x in model.module.state_dict().items()}
            out = tmp_path / f"{offload}-{method.__name__}"
            out.mkdir()
            manifest = save_and_prove(model, out, folder, spill)
            assert not broken_promise(load_directory(out, manifest.formats), manifest.formats)
            found.append(state)
    for plain, spilled in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(x, spilled[key]) for key, x in plain.items())
    assert not list(scratch.iterdir())  # the disk has everything back


SCRIPT = """
import dataclasses, json, re, sys
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.model.checkpoint import load_directory
from compressor.model.saving import save
from compressor.model.families import find_family
from compressor.model.model import Model
from compressor.prune import sparsegpt
from compressor.run.machine import give_back_memory
from compressor.run.prove import save_and_prove
from compressor.screen import Silent
from compressor.training.workbench import Workbench

torch.set_num_threads(1)
root = Path(sys.argv[1])


def anonymous():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def make(layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=192, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=576, vocab_size=256,
    )
    model = Model(LlamaForCausalLM(config).eval(), find_family("llama"), None)
    model.source_dtype = "bfloat16"
    folder = root / str(layers)
    folder.mkdir()
    save(model, folder, folder)


def prune(layers, offload, number):
    scratch, out = root / f"scratch{number}", root / f"out{number}"
    scratch.mkdir(), out.mkdir()
    ids = torch.randint(3, 256, (2, 4, 32), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    read = lambda split, n, **shape: batches
    work = Workbench(0, torch.device("cpu"), scratch, Silent(), print, read, None, None)
    give_back_memory()
    before, seen = anonymous(), []

    class Watching(Silent):
        @contextmanager
        def progress(self, label, total):
            yield lambda step: seen.append(anonymous())  # at the end of every block

    work = dataclasses.replace(work, _screen=Watching())
    spill = scratch if offload else None
    model = load_directory(root / str(layers), None, spill)
    size = sum(p.nbytes for p in model.module.parameters())
    sparsegpt.run(model, sparsegpt.Options(samples=8, length=32, offload=offload), work)
    save_and_prove(model, out, root / str(layers), spill)
    seen.append(anonymous())
    assert len(seen) == layers + 1
    return {"size": size, "peak": max(seen) - before}


for layers in (2, 16):
    make(layers)
prune(2, True, 0)
found = [prune(layers, offload, 2 + i) for i, (layers, offload) in enumerate(
    [(2, True), (16, True), (16, False)]
)]
print(json.dumps(found))
"""


def test_memory_stays_flat_while_the_model_grows_eightfold(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    small, large, plain = json.loads(done.stdout.splitlines()[-1])
    assert large["size"] > 6 * small["size"] > 20 * MB
    assert large["peak"] < small["peak"] + 0.3 * large["size"]
    assert plain["peak"] > 0.9 * plain["size"]
