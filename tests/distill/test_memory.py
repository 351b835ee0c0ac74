"""What distill.kd needs beyond the models does not grow with vocabulary x length."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, re, sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.distill import kd
from compressor.model.families import find_family
from compressor.model.model import Model
from compressor.run.machine import peak_memory, reset_peak_memory

torch.set_num_threads(1)
VOCABULARY = 32768


def build():
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, vocab_size=VOCABULARY, max_position_embeddings=2048,
    )
    config.final_logit_softcapping = 30.0
    module = LlamaForCausalLM(config).eval()
    module.lm_head = torch.nn.Linear(32, VOCABULARY)  # with a bias
    return Model(module, find_family("llama"), None)


def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def extra(length):
    ids = torch.randint(3, VOCABULARY, (1, length))
    reset_peak_memory()
    before = resident()
    objective({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).backward()
    return peak_memory() - before


student, teacher = build(), build()
teacher.module.requires_grad_(False)
objective = kd.objective(kd.Options(ce=0.5), student, teacher)
extra(8)  # gradients exist from here on
print(json.dumps({"512": extra(512), "2048": extra(2048)}))
"""


def test_four_times_the_length_needs_no_more_memory():
    if sys.platform != "linux":
        pytest.skip("peak memory is read from /proc, which only Linux has")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    one_logits_tensor_more = (2048 - 512) * 32768 * 4
    assert peaks["2048"] - peaks["512"] < one_logits_tensor_more / 3, peaks
