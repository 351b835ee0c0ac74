"""What the model card of a GGUF file says besides: how weights are stored, what llama.cpp gave."""

from compressor.engines import GGUF
from compressor.model.manifest import Manifest


def gguf_lines(manifest: Manifest) -> list[str]:
    """Paragraphs; none for other artefacts."""
    if manifest.engine not in GGUF:
        return []
    return [_stored(manifest), _ran(manifest)]


def _stored(manifest: Manifest) -> str:
    metrics = manifest.metrics
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(metrics["stored"].items()))
    said = f"`model.gguf` holds tensors of these types: {kinds}."
    if metrics["requantized"]:
        said += (
            f" Weights were rounded to {metrics['requantized']} by this export, as it was asked to."
        )
    elif metrics["rounded_tensors"]:
        said += f" {metrics['rounded_tensors']} of them were rounded to that float type."
    else:
        said += " All hold the weights of the checkpoint bit for bit; nothing was rounded again."
    if metrics["float_activations"]:
        said += (
            f" {metrics['float_activations']} layers of the checkpoint round their activations; "
            "nothing in this file says so."
        )
    if metrics["tokenizer"] == "none":
        said += " There is no tokenizer in it: it takes token ids."
    return f"{said} Texts may have {metrics['context']:,} tokens."


def _ran(manifest: Manifest) -> str:
    if manifest.engine == "gguf":
        return (
            "llama.cpp was not installed where this file was made, so it has not run there: "
            "`pip install 'compress[llama-cpp]'`, then `compress export` into a new directory."
        )
    metrics = manifest.metrics
    served = max(metrics["served"].values())
    said = (
        "llama.cpp, which rounds activations and its cache, gives the model's outputs to "
        f"{served:.1e}."
    )
    if "tokenized" in metrics:
        said += " It cuts test texts into the same tokens as the tokenizer beside it."
    return said
