"""Peak resident memory of loads and saves, measured in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

MB = 1_000_000
SHARD = 6 * MB
LARGEST = 8192 * 256 * 4  # an embedding table in float32
LOGITS = (1 * 5 + 2 * 16 + 3 * 11) * 8192 * 4  # of the probe, in float32
SLACK = 6 * MB  # of the C library, of Python, and of pages that a library touches first
# glibc maps large blocks only until the first is freed; then they come from a heap, and what a
# peak shows depends on the holes in it. With thresholds of our own every tensor is mapped.
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}

SCRIPT = """
import json, re, sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.export import safetensors as export
from compressor.model import stream
from compressor.model.checkpoint import load_directory
from compressor.model.saving import save
from compressor.model.families import find_family
from compressor.model.manifest import WeightFormat
from compressor.model.layers import install
from compressor.model.model import Model
from compressor.model.sparse import promise, prunable
from compressor.run.machine import peak_memory, reset_peak_memory
from compressor.run.prove import save_and_prove

torch.set_num_threads(1)
root, found = Path(sys.argv[1]), {}
stream.SHARD = int(sys.argv[2])


def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure(name, act):
    if name:
        reset_peak_memory()
        before = resident()
    result = act()
    if name:
        found[name] = peak_memory() - before
    return result


def build(layers=8, width=256, vocabulary=8192):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=3 * width, vocab_size=vocabulary,
    )
    return Model(LlamaForCausalLM(config).eval(), find_family("llama"), None)


def quantize(model):
    linears = [n for n, m in model.module.named_modules() if isinstance(m, torch.nn.Linear)]
    names = [*linears, "model.embed_tokens"]
    model.formats = {name: WeightFormat(bits=4, group=32) for name in names}
    install(model.module, model.formats)


def everything(folder, model, measured):
    name = lambda text: text if measured else None
    for dtype in ("float32", "bfloat16"):
        model.source_dtype = dtype
        path = folder / dtype
        path.mkdir(parents=True)
        measure(name(f"save {dtype}"), lambda: save(model, path, path))
    load = lambda: load_directory(folder / "bfloat16")
    loaded = measure(name("load bfloat16"), load)
    if measured:
        found["model"] = sum(p.nbytes for p in loaded.module.parameters())
        found["pieces"] = len(list((folder / "float32").glob("model-*")))
    del loaded
    quantize(model)
    model.source_dtype = "float32"
    path = folder / "int4"
    path.mkdir()
    measure(name("save int4"), lambda: save(model, path, path))
    formats = model.formats
    model = measure(name("load int4"), lambda: load_directory(path, formats))
    if measured:
        found["int4 model"] = sum(t.nbytes for t in model.module.state_dict().values())
    path = folder / "dense"
    path.mkdir()
    measure(name("export"), lambda: export.run(model, export.Options(), path))
    model = build() if measured else build(1, 32, 96)
    for layer, linear in prunable(model).items():
        linear.weight.data[:, ::2] = 0
        promise(model, layer, "2:4")
    path = folder / "sparse"
    path.mkdir()
    options = export.Options(packed=True)
    measure(name("export sparse"), lambda: export.run(model, options, path))
    sparse = measure(name("load sparse"), lambda: load_directory(path))
    del sparse
    path = folder / "proved"
    path.mkdir()
    measure(name("save and prove"), lambda: save_and_prove(model, path, path))


everything(root / "warm", build(1, 32, 96), False)
everything(root / "real", build(), True)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """Bytes by which each action's peak exceeded what was resident before."""
    if sys.platform != "linux":
        pytest.skip("peak memory is read from /proc, which only Linux has")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("peaks")), str(SHARD)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | STEADY)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_model_is_large_enough_to_tell(peaks):
    assert peaks["model"] > 40 * MB and peaks["pieces"] > 5


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int4"])
def test_a_save_needs_no_more_than_one_tensor(peaks, form):
    assert peaks[f"save {form}"] < LARGEST + SLACK


def test_a_cast_load_holds_no_whole_file(peaks):
    assert peaks["load bfloat16"] < peaks["model"] + LARGEST + SLACK


def test_a_packed_load_holds_no_whole_file(peaks):
    assert peaks["load int4"] < peaks["int4 model"] + LARGEST + SLACK


def test_an_export_needs_no_second_model(peaks):
    # a float table, and the logits beside their copy in the probe
    assert peaks["export"] < LARGEST + 2 * LOGITS + SLACK


def test_the_proof_of_a_save_needs_no_second_model(peaks):
    assert peaks["save and prove"] < LARGEST + 2 * LOGITS + SLACK


def test_sparse_weights_are_packed_and_filled_up_one_at_a_time(peaks):
    assert peaks["export sparse"] < LARGEST + 2 * SLACK  # the probe's logits
    assert peaks["load sparse"] < peaks["model"] + SLACK  # without the packed third of it
