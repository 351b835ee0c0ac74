"""The model card of an artefact: what was done, what was measured, how to load it."""

from collections import Counter

import yaml

from compressor.engines import GGUF
from compressor.model.manifest import Manifest, StageRecord
from compressor.model.sources import SIDE
from compressor.model.sparse import patterns_text
from compressor.run.card_gguf import gguf_lines
from compressor.run.card_usage import PLAIN, usage

CARD = "README.md"
# in metrics: {stage, with, without}, validation losses of the last stage that measured both
SIDE_LOSSES = "side_losses"

PACKED_GAIN = """\
{weights} sparse weights are stored without their zeros: {bytes:,} bytes of weights instead of \
{dense_bytes:,}, {saved:.1%} smaller on disk. In memory the zeros are back, so it takes no less \
memory and is no faster by itself. Plain transformers cannot open it; \
`compress export DIR --to safetensors --out DENSE` writes a directory that it can."""

CODED_GAIN = """\
The codes of {weights} weights are stored in a Huffman code: {bytes:,} bytes of weights instead of \
{packed_bytes:,}, {saved:.1%} smaller on disk. Loading decodes them, so the model takes no less \
memory and is no faster. Plain transformers cannot open it."""


def model_card(
    manifest: Manifest,
    method: str,
    task: str,
    stages: list[StageRecord],
) -> str:
    """README.md with a YAML header; states only what was measured.

    Args:
        manifest: of the artefact.
        method: that wrote it.
        task: of the model.
        stages: that came before.
    """
    base = manifest.base_model
    own = manifest.metrics.keys() & {"packed", "huffman"}
    library = "compress" if own else "transformers"
    served = "gguf" if manifest.engine in GGUF else manifest.engine
    licence = {"license": base["license"]} if base.get("license") else {}
    header = licence | {
        "base_model": base["id"],
        "library_name": library if manifest.engine in PLAIN else served,
        "tags": ["compress", *[s.method for s in stages], method],
    }
    done = [f"1. `{s.method}` in {s.seconds:.0f} s" for s in stages] + [f"1. `{method}`"]
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {base['id']}, compressed",
        *([] if licence else ["The licence of the original is not stated; ask whoever made it."]),
        "What was done, in order:\n\n" + "\n".join(done),
        _weights(manifest),
        _agreement(manifest),
        *_differences(manifest),
        *_genai(manifest),
        *gguf_lines(manifest),
        *_sparsity(manifest),
        *_coding(manifest),
        *_cache(manifest),
        *_fidelity(manifest.metrics["fidelity"]),
        *_side_paths(manifest),
        "Every option, seed and digest is in `manifest.json`. `DIR` is the folder of this file.",
        "```python\n" + usage(manifest, task) + "\n```",
    ]
    return "\n\n".join(lines) + "\n"


def _weights(manifest: Manifest) -> str:
    """How many parameters there are, and how those that are quantized are stored."""
    kinds = Counter((f.bits, f.group) for f in manifest.formats.values() if f.bits is not None)
    stored = []
    for (bits, group), count in kinds.items():
        share = f"{group} weights" if group else "row"
        stored.append(f"{count} matrices in {bits} bits, a scale for every {share}")
    return "; ".join([f"{manifest.metrics['parameters']:,} parameters", *stored]) + "."


def _agreement(manifest: Manifest) -> str:
    """How far the engine that serves the artefact is from torch."""
    error = max(manifest.metrics["agreement"].values())
    allowed = f"(allowed: {manifest.metrics['tolerance']:.0e})"
    if manifest.engine in GGUF:
        return f"Read back into PyTorch, the file gives what it should to {error:.1e} {allowed}."
    return (
        f"{manifest.engine} agrees with the torch reference of the same arithmetic to a relative "
        f"error of {error:.1e} {allowed}."
    )


def _differences(manifest: Manifest) -> list[str]:
    """How far logits are off as served, and whether the text is the same."""
    found = manifest.metrics.get("differences", {}).get("served", {})
    said = []
    if logits := found.get("logits"):
        said.append(
            f"As served, logits of the probe (random tokens) are off by {logits['mean']:.1e} on "
            f"average and {logits['max']:.1e} at most; the most likely answer is that of PyTorch "
            f"at {found['top1_agreement']:.1%} of the positions."
        )
    if greedy := found.get("greedy"):
        said.append(
            f"Token by token on its cache, {greedy['equal']} of {greedy['tokens']} greedy tokens "
            "are those of PyTorch."
        )
    return [" ".join(said)] if said else []


def _genai(manifest: Manifest) -> list[str]:
    """Who ran an artefact of export.genai, and whether its tokenizer can be trusted."""
    found = manifest.metrics.get("genai", {})
    if why := found.get("not_run"):
        return [f"onnxruntime-genai has not run this directory; ONNX Runtime has. {why}"]
    if found.get("tokenizer") is False:
        return [
            "The tokenizer of onnxruntime-genai gives other ids than that of transformers for "
            "these files: encode with transformers, as below."
        ]
    return []


def _saved(packed: dict[str, int]) -> float:
    """Share of the bytes of dense weight files that a packed artefact does without."""
    return 1 - packed["bytes"] / packed["dense_bytes"]


def _coding(manifest: Manifest) -> list[str]:
    """What a Huffman code saves."""
    coded = manifest.metrics.get("huffman")
    if not coded:
        return []
    return [CODED_GAIN.format(**coded, saved=1 - coded["bytes"] / coded["packed_bytes"])]


def _cache(manifest: Manifest) -> list[str]:
    """What a token takes in a cache of 8 bits."""
    if "cache" not in manifest.metrics:
        return []
    taken = manifest.metrics["cache"]["bytes_per_token"]
    return [
        f"Keys and values are stored in 8 bits: a token takes {taken['int8']:,} bytes of cache, in "
        f"float32 it would take {taken['float32']:,}."
    ]


def _sparsity(manifest: Manifest) -> list[str]:
    """What is zero, and what that saves: a file of zeros is a dense file unless it is packed."""
    patterns, metrics = patterns_text(manifest.formats), manifest.metrics
    if not patterns:
        return []
    zeros = (
        f"Sparse: {patterns}; {metrics['nonzero_parameters']:,} of {metrics['parameters']:,} "
        "parameters are not zero."
    )
    if packed := metrics.get("packed"):
        return [f"{zeros} {PACKED_GAIN.format(**packed, saved=_saved(packed))}"]
    served, whose = "plain transformers", ""
    if manifest.engine not in PLAIN:
        served = "llama.cpp" if manifest.engine in GGUF else "ONNX Runtime"
        if manifest.engine not in GGUF:
            whose = " The zeros were counted in the checkpoint; `verify` does not count them here."
    return [
        f"{zeros}{whose} They are stored like other weights: this file is not smaller and, in "
        f"{served}, not faster than the dense model's. Only a packed layout saves space and only "
        "a sparse kernel saves time."
    ]


def _side_paths(manifest: Manifest) -> list[str]:
    """Who computes the side paths of layers, and what they are worth."""
    layers = sum(form.side_rank is not None for form in manifest.formats.values())
    dropped = manifest.metrics.get("dropped_side_paths", 0)
    if not layers + dropped:
        return []
    said = f"The low-rank side paths of {layers or dropped} layers are "
    if dropped:
        said += "left out (`side: drop`)."
    elif manifest.engine == "torch":
        said += (
            f"in `{SIDE}`. `compressor.open_engine(DIR)` reads them, as below; plain transformers "
            "computes without them."
        )
    else:
        said += "part of the graph."
    if found := manifest.metrics.get(SIDE_LOSSES):
        said += (
            f" Loss on validation rows after `{found['stage']}`: {found['with']:.4f} with them, "
            f"{found['without']:.4f} without."
        )
    return [said]


def _fidelity(quality: dict[str, float]) -> list[str]:
    rows = []
    for key in ("cosine", "kl", "top1_agreement"):
        if key in quality:
            rows.append(
                f"{key} to the original on held-out text of the same data: {quality[key]:.4f} "
                f"(95 % interval {quality[f'{key}_low']:.4f} to {quality[f'{key}_high']:.4f})"
            )
    return ["\n".join(f"- {row}" for row in rows)] if rows else []
