"""The model card of an artefact: what was done, what was measured, how to load it."""

from typing import Any

import yaml

from compressor.model.manifest import Manifest, StageRecord

ENCODER_USAGE = """\
import onnxruntime, transformers
tokens = transformers.AutoTokenizer.from_pretrained(DIR)(["a sentence"], return_tensors="np")
vectors = onnxruntime.InferenceSession(DIR + "/model.onnx").run(["{output}"], {{**tokens}})[0]"""

DECODER_USAGE = """\
import compressor, transformers
engine, tokenizer = compressor.open_engine(DIR), transformers.AutoTokenizer.from_pretrained(DIR)
print(tokenizer.decode(compressor.generate(engine, tokenizer("Once upon a time").input_ids, 60)))"""

TORCH_USAGE = """\
from transformers import {auto}, AutoTokenizer
model, tokenizer = {auto}.from_pretrained(DIR), AutoTokenizer.from_pretrained(DIR)
print(model(**tokenizer("a sentence", return_tensors="pt")))"""


def usage(engine: str, task: str, outputs: dict[str, Any]) -> str:
    """Three lines of working Python that use an artefact; DIR stands for its folder."""
    if engine == "torch":
        return TORCH_USAGE.format(
            auto="AutoModelForCausalLM" if task == "causal-lm" else "AutoModel"
        )
    if task == "causal-lm":
        return DECODER_USAGE
    names = ("sentence_embedding", "last_hidden_state", "logits")
    return ENCODER_USAGE.format(output=next(name for name in names if name in outputs))


def model_card(manifest: Manifest, method: str, task: str, stages: list[StageRecord]) -> str:
    """README.md with a YAML header; states only what was measured."""
    base = manifest.base_model
    header = {
        "license": base.get("license") or "other",
        "base_model": base["id"],
        "library_name": "transformers" if manifest.engine == "torch" else manifest.engine,
        "tags": ["compress", *[s.method for s in stages], method],
    }
    done = [f"1. `{s.method}` in {s.seconds:.0f} s" for s in stages] + [f"1. `{method}`"]
    agreement = max(manifest.metrics["agreement"].values())
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {base['id']}, compressed",
        "What was done, in order:\n\n" + "\n".join(done),
        f"{manifest.engine} agrees with the torch reference of the same arithmetic to a relative "
        f"error of {agreement:.1e} (allowed: {manifest.metrics['tolerance']:.0e}).",
        *_fidelity(manifest.metrics["fidelity"]),
        "Every option, seed and digest is in `manifest.json`.",
        "```python\n" + usage(str(manifest.engine), task, manifest.metrics["agreement"]) + "\n```",
    ]
    return "\n\n".join(lines) + "\n"


def _fidelity(quality: dict[str, float]) -> list[str]:
    rows = []
    for key in ("cosine", "kl", "top1_agreement"):
        if key in quality:
            rows.append(
                f"{key} to the original on held-out text of the same data: {quality[key]:.4f} "
                f"(95 % interval {quality[f'{key}_low']:.4f} to {quality[f'{key}_high']:.4f})"
            )
    return ["\n".join(f"- {row}" for row in rows)] if rows else []
