"""The metadata of a GGUF file that follows from a config, and configs that llama.cpp cannot serve.

What the graphs of llama.cpp take for granted is checked before any work: a value that they ignore
would give another model without a word. Sliding windows of families that llama.cpp computes without
them limit the context of the file instead, since both agree on every text that a window covers.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import CompressError
from compressor.export.gguf_names import arch_of
from compressor.export.gguf_table import Arch
from compressor.model.families import Family
from compressor.model.model import Model
from compressor.model.pooling import FLAGS
from compressor.model.probe import SHAPES

TASKS = {"bert": "feature-extraction"}  # of all other families: causal-lm
_POOLING = {"mean": 1, "cls": 2}  # llama_pooling_type; 0 gives the state of every token
_ELSEWHERE = "use export.onnx or export.safetensors"
FREQUENCIES = "rope_freqs.weight"


def metadata(family: Family, config: Any) -> dict[str, Any]:
    """{key: value} of sizes, norms, rotation and windows; ints, floats, bools, strings, lists."""
    arch, sizes = arch_of(family), family.read_sizes(config)
    rms = "" if family.norm == "layer" else "rms_"
    eps = getattr(config, family.eps)
    found: dict[str, Any] = {
        "block_count": sizes["layers"],
        "context_length": context(arch, config),
        "embedding_length": sizes["hidden"],
        "feed_forward_length": sizes["mlp"],
        "vocab_size": sizes["vocabulary"],
        "attention.head_count": sizes["heads"],
        "attention.head_count_kv": sizes["kv_heads"],
        f"attention.layer_norm_{rms}epsilon": float(eps),
    }
    if not arch.square:
        found |= dict.fromkeys(
            ("attention.key_length", "attention.value_length"), sizes["head_dim"]
        )
    found |= _rotation(config, sizes["head_dim"]) | _windows(arch, config) | dict(arch.constants)
    given = {key: getattr(config, name, None) for key, name in arch.values.items()}
    found |= {key: value for key, value in given.items() if value is not None}
    return {f"{arch.name}.{key}": value for key, value in found.items()}


def pooling(model: Model) -> dict[str, Any]:
    """How llama.cpp pools the tokens of a sentence encoder, where it can; the types of tokens."""
    if model.task != "feature-extraction":
        return {}
    found = {"tokenizer.ggml.token_type_count": model.config.type_vocab_size}
    mode = model.pooling.mode if model.pooling else None
    assert mode is None or mode in FLAGS
    return found | {"bert.pooling_type": _POOLING.get(mode or "", 0)}


def extra_tensors(config: Any, head_dim: int) -> dict[str, Tensor]:
    """Tensors that no parameter of ours stands for: how llama3 slows its rotations, float32."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return {}
    base = rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    wave = 2 * math.pi * base
    low, high, factor = (rope[k] for k in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = (rope["original_max_position_embeddings"] / wave - low) / (high - low)
    # transformers mixes frequencies; llama.cpp divides them by this
    mixed = 1 / ((1 - smooth.clamp(0, 1)) / factor + smooth.clamp(0, 1))
    return {FREQUENCIES: mixed.float()}


def refuse_config(model: Model) -> None:
    """Raise CompressError where llama.cpp would compute something else than this model."""
    family, config = model.family, model.config
    arch, sizes = arch_of(family), model.sizes
    task = TASKS.get(family.model_type, "causal-lm")
    if model.task != task:
        raise CompressError(
            f"llama.cpp serves {family.model_type} for {task}, and this model is for {model.task}",
            _ELSEWHERE,
        )
    key, known = arch.activation
    _refuse_unless(arch, key, getattr(config, key), known)
    for key, value in arch.fixed.items():
        _refuse_unless(arch, key, getattr(config, key, value), (value,))
    if "attn_logit_softcapping" in arch.values and config.attn_logit_softcapping is None:
        _refuse_unless(arch, "attn_logit_softcapping", None, ("a number",))
    if arch.square and sizes["heads"] * sizes["head_dim"] != sizes["hidden"]:
        raise CompressError(
            f"llama.cpp wants heads x head_dim of {arch.name} to be the hidden size, and this "
            f"model has {sizes['heads']} x {sizes['head_dim']} and {sizes['hidden']}",
            f"prune hidden and heads together, or {_ELSEWHERE}",
        )
    _refuse_scale(arch, config, sizes)
    _refuse_rotation(arch, config)
    if context(arch, config) < max(length for _, length in SHAPES):
        raise CompressError(
            f"llama.cpp computes {arch.name} without sliding windows, and this model has one of "
            f"{config.sliding_window} tokens",
            _ELSEWHERE,
        )


def context(arch: Arch, config: Any) -> int:
    """Tokens that a text may have, as far as llama.cpp agrees with the model."""
    most = config.max_position_embeddings
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    if arch.windows or not window or "sliding_attention" not in kinds:
        return most
    return min(most, window)


def _refuse_unless(arch: Arch, key: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        allowed = " or ".join(str(one) for one in known)
        raise CompressError(
            f"llama.cpp computes {arch.name} with {key}: {allowed}, and this model has {value}",
            _ELSEWHERE,
        )


def _refuse_scale(arch: Arch, config: Any, sizes: Mapping[str, int]) -> None:
    """Gemma names the number whose root attention is divided by; llama.cpp goes by the depth."""
    if arch.scale_of_heads is None:
        return
    deep = sizes["layers"] == arch.scale_of_heads
    taken = sizes["hidden"] // sizes["heads"] if deep else sizes["head_dim"]
    _refuse_unless(arch, "query_pre_attn_scalar", config.query_pre_attn_scalar, (taken,))


def _rope(config: Any) -> dict[str, Any]:
    """How full attention rotates; {} for families with a table of positions."""
    given = getattr(config, "rope_parameters", None) or {}
    return given.get("full_attention", given)


def _refuse_rotation(arch: Arch, config: Any) -> None:
    kind = _rope(config).get("rope_type", "default")
    known = ("default", "linear", "llama3") if arch.name == "llama" else ("default", "linear")
    near = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {})
    _refuse_unless(arch, "rope_type", kind, known)
    _refuse_unless(arch, "rope_type of windows", near.get("rope_type", "default"), ("default",))


def _rotation(config: Any, head_dim: int) -> dict[str, Any]:
    rope = _rope(config)
    if not rope:
        return {}
    share = rope.get("partial_rotary_factor", 1.0)
    found: dict[str, Any] = {
        "rope.dimension_count": int(head_dim * share),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope.get("rope_type") == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return found


def _windows(arch: Arch, config: Any) -> dict[str, Any]:
    """Which layers see a window only, how wide it is, and how they rotate."""
    if not arch.windows:
        return {}
    near = config.rope_parameters.get("sliding_attention", _rope(config))
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [k == "sliding_attention" for k in config.layer_types],
        "rope.freq_base_swa": float(near["rope_theta"]),
    }
