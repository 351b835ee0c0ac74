"""A directory that the generate loop of onnxruntime-genai runs: export.onnx and one file more.

The graph is that of export.onnx, our codes and all. genai_config.json tells the library the names
of its inputs and outputs, its sizes and the special tokens; `type: decoder` is its word for a
decoder whose architecture it need not know. Past and present share one buffer of `max_length`
tokens (`past_present_share_buffer`), so that no step copies the cache; a graph without the fused
attention gives back a longer cache at every step instead.

Where the library is installed, it must give the probe's outputs and greedy text before the export
counts as done. Where it is not, ONNX Runtime proves the graph, and manifest and card say that the
library did not run it.
"""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from compressor.engines import installed
from compressor.engines.genai import CONFIG, GenaiEngine
from compressor.errors import CompressError
from compressor.export import onnx
from compressor.export.files import artifact
from compressor.model.manifest import Artifact
from compressor.model.model import Model
from compressor.options import options

# Tokens of a text unless its user says more: memory for all of them is taken at once.
_LONGEST = 4096
_TEXT = "Once upon a time, in 1999, there was a naïve “wolf”:\n  isn't it?"


@options
class Options(onnx.Options):
    """Those of export.onnx: the graph is the same."""


def run(model: Model, options: Options, out: Path) -> Artifact:
    """Write the files of export.onnx and genai_config.json.

    Raises:
        CompressError: the model is no decoder, or export.onnx refuses it.
    """
    refuse(model)
    metrics = onnx.run(model, options, out).manifest.metrics
    config = _config(model, onnx.fuses(model, options))
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if installed(GenaiEngine.name):
        said = {"tokenizer": _reads_like(model, out)}
        return artifact(model, out, GenaiEngine.name, model.formats, metrics | {"genai": said})
    said = {"not_run": "It was not installed: pip install 'compress[genai]'."}
    return artifact(model, out, "onnxruntime", model.formats, metrics | {"genai": said})


def _reads_like(model: Model, out: Path) -> bool | None:
    """Whether the library's own tokenizer gives the ids of transformers; None without any."""
    if model.processor is None:
        return None
    with closing(GenaiEngine(out)) as engine:
        return engine.encode(_TEXT) == model.processor(_TEXT)["input_ids"]


def refuse(model: Model) -> None:
    """Raise CompressError for what the library's loop of one decoder cannot run."""
    if model.task != "causal-lm":
        raise CompressError(
            f"export.genai is for decoders that write text; this {model.family.model_type} is for "
            f"{model.task}",
            "use export.onnx",
        )


def _config(model: Model, shares: bool) -> dict[str, Any]:
    """genai_config.json; keys as the library's own model builder writes them."""
    sizes, most = model.sizes, int(model.config.max_position_embeddings)
    special = _special_tokens(model)
    decoder = {
        "session_options": {"provider_options": []},
        "filename": "model.onnx",
        "head_size": sizes["head_dim"],
        "hidden_size": sizes["hidden"],
        "inputs": {
            **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": sizes["heads"],
        "num_hidden_layers": sizes["layers"],
        "num_key_value_heads": sizes["kv_heads"],
    }
    about = {"type": "decoder", "context_length": most, "vocab_size": sizes["vocabulary"]}
    longest = min(most, _LONGEST) if shares else most
    search = {"max_length": longest, "do_sample": False, "past_present_share_buffer": shares}
    return {"model": {**about, **special, "decoder": decoder}, "search": search}


def _special_tokens(model: Model) -> dict[str, Any]:
    """Ids of the first, the last and the padding token, of generation_config.json before config."""
    places: tuple[Any, Any] = (model.module.generation_config, model.config)
    found: dict[str, Any] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        stated = (getattr(place, key, None) for place in places)
        first = next((value for value in stated if value is not None), None)
        if first is not None:
            found[key] = first
    last = found.get("eos_token_id", 0)  # the library wants a padding id; nothing is padded here
    found.setdefault("pad_token_id", last[0] if isinstance(last, list) else last)
    return found
