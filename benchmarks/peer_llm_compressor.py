"""Quantize a model with llm-compressor and score it: run by benchmarks/peers.py in its own venv.

    python -m venv PEER && PEER/bin/pip install "torch<2.14" llmcompressor==0.14.0.1
    COMPRESS_PEER=PEER/bin/python python benchmarks/quantization.py ptq

It reads names of job files from standard input, one after the other. A job names a model's
directory, a method, a scheme and files of rows; the answer is written beside it, whole or not at
all, and its name printed. Nothing of compressor is imported: the environments need not agree.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from watched import cost


def weights(job, group):
    strategy = "channel" if group is None else "group"
    return QuantizationArgs(
        **{"num_bits": job["bits"], "type": "int", "symmetric": job["symmetric"]},
        **{"strategy": strategy, "group_size": group},
    )


def recipe(job):
    """Modifiers of a method; layers that the group does not divide get one scale per channel."""
    inputs = None
    if job["activation"] == "token":
        inputs = QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True)
    groups = {
        "even": QuantizationScheme(
            targets=["Linear"], weights=weights(job, job["group"]), input_activations=inputs
        )
    }
    if job["uneven"]:
        groups["uneven"] = QuantizationScheme(targets=job["uneven"], weights=weights(job, None))
    given = {"config_groups": groups, "ignore": job["ignore"]}
    if job["method"] == "gptq":
        return [GPTQModifier(**given, actorder="static")]
    before = {"awq": AWQModifier, "smoothquant": SmoothQuantModifier}.get(job["method"])
    return [*([before()] if before else []), QuantizationModifier(**given)]


@torch.no_grad()
def score(model, rows, task):
    """Mean loss of rows, or sentence embeddings [N, H]."""
    found = []
    for first in range(0, len(rows["input_ids"]), 8):
        batch = {k: v[first : first + 8] for k, v in rows.items()}
        if task == "causal-lm":
            found.append(model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss)
            continue
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        vectors = (states * mask).sum(1) / mask.sum(1)
        found += torch.nn.functional.normalize(vectors, dim=-1)
    return torch.stack(found) if task != "causal-lm" else torch.stack(found).mean().view(1)


def main(file):
    job = json.loads(file.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    calibration = load_file(job["calibration"])
    rows = Dataset.from_dict({k: v.tolist() for k, v in calibration.items()})
    modifiers = recipe(job)
    kind = AutoModelForCausalLM if job["task"] == "causal-lm" else AutoModel
    loaded = []

    def load():
        loaded.append(kind.from_pretrained(job["model"], dtype=torch.float32).eval())
        return loaded[0]

    facts = cost(
        load,
        lambda model: oneshot(
            **{"model": model, "dataset": rows, "recipe": modifiers, "output_dir": None},
            max_seq_length=len(calibration["input_ids"][0]),
            num_calibration_samples=len(rows),
        ),
    )
    model = loaded[0]
    if job["heldout"]:
        save_file({"score": score(model, load_file(job["heldout"]), job["task"])}, job["scores"])
    return facts


if __name__ == "__main__":
    torch.Tensor.pin_memory = lambda self, *_: self  # AWQ pins, which takes an accelerator
    for line in sys.stdin:
        job = Path(line.strip())
        answer = json.dumps(main(job))
        job.with_suffix(".answer").write_text(answer, encoding="utf-8")
        print(f"done {job}", flush=True)
