"""A pico model of every family, random and untrained, for tests and benchmarks.

`pico(name)` gives a Model; shapes differ from family to family only where the architecture wants
it. Two or three layers, hidden 32, four heads of 8, MLP 48.
"""

import torch
import transformers
from transformers import AutoModelForCausalLM

from compressor.model.conv1d import to_linear
from compressor.model.families import find_family
from compressor.model.model import Model
from compressor.model.sparse import promise, prunable
from compressor.numerics.masks import keep_largest

VOCABULARY = 96
_TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
_TEXT = _SHAPE | {"vocab_size": VOCABULARY, "max_position_embeddings": 128}
_GROUPED = _TEXT | _TOKENS | {"num_key_value_heads": 2}
_HEAD_DIM = _GROUPED | {"head_dim": 8}
_GEMMA = _HEAD_DIM | {"query_pre_attn_scalar": 8, "sliding_window": 8}
_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
_IMAGE = _SHAPE | {"image_size": 16, "patch_size": 4, "num_labels": 5}

# {family: (config class, config values, class or None for the causal language model)}
CONFIGS = {
    "llama": ("LlamaConfig", _HEAD_DIM, None),
    "mistral": ("MistralConfig", _HEAD_DIM | {"sliding_window": 8}, None),
    "qwen2": ("Qwen2Config", _GROUPED, None),
    "qwen3": ("Qwen3Config", _HEAD_DIM, None),
    "gemma2": ("Gemma2Config", _GEMMA | {"layer_types": _KINDS}, None),
    "gemma3_text": ("Gemma3TextConfig", _GEMMA | {"layer_types": _KINDS}, None),
    "phi3": ("Phi3Config", _GROUPED, None),
    "gpt2": (
        "GPT2Config",
        _TOKENS
        | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 64}
        | {"vocab_size": VOCABULARY, "initializer_range": 0.2},
        None,
    ),
    "opt": (
        "OPTConfig",
        _TOKENS
        | {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48}
        | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
        | {"init_std": 0.2},
        None,
    ),
    "gpt_neox": ("GPTNeoXConfig", _TEXT | _TOKENS, None),
    "bert": ("BertConfig", _TEXT | {"pad_token_id": 0}, "BertForMaskedLM"),
    "roberta": ("RobertaConfig", _TEXT | _TOKENS, "RobertaForMaskedLM"),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCABULARY}
        | {"max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0},
        "DistilBertForMaskedLM",
    ),
    "t5": (
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2}
        | {"num_heads": 4, "vocab_size": VOCABULARY, "initializer_factor": 1.0}
        | {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0},
        "T5ForConditionalGeneration",
    ),
    "whisper": (
        "WhisperConfig",
        _TOKENS
        | {"d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "init_std": 0.2}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 16}
        | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY}
        | {"max_source_positions": 20, "max_target_positions": 32, "decoder_start_token_id": 2}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
        "WhisperForConditionalGeneration",
    ),
    "vit": ("ViTConfig", _IMAGE, "ViTForImageClassification"),
    "deit": ("DeiTConfig", _IMAGE, "DeiTForImageClassification"),
}


def pico(name, seed=0, head=True, processor=None, **overrides):
    """A float32 Model of a family; `head=False` gives the bare backbone."""
    config_name, values, class_name = CONFIGS[name]
    config = getattr(transformers, config_name)(**values | overrides)
    if not head:
        cls = transformers.AutoModel._model_mapping[type(config)]
    elif class_name is None:
        cls = AutoModelForCausalLM._model_mapping[type(config)]
    else:
        cls = getattr(transformers, class_name)
    torch.manual_seed(seed)
    module = to_linear(cls(config)).eval()
    roughen(module)
    return Model(module, find_family(name), processor)


def roughen(module):
    """Move biases and norm weights off 0 and 1, so that no test passes because they are trivial."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            noise = torch.randn_like(parameter) * 0.1
            parameter.data.add_(noise if name.endswith("bias") else noise.abs())


def random_inputs(model, rows=3, length=11, seed=7):
    """A batch of what the model reads; row 1 has padding, in front for decoders."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    config = model.config
    tokens = lambda: torch.randint(5, VOCABULARY, (rows, length), generator=draw)  # noqa: E731
    mask = torch.ones(rows, length, dtype=torch.long)
    if model.task == "causal-lm":
        mask[1:2, :3] = 0
    else:
        mask[1:2, -3:] = 0
    if model.family.model_type in ("vit", "deit"):
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=draw)}
    if model.family.model_type == "whisper":
        frames = 2 * config.max_source_positions
        shape = (rows, config.num_mel_bins, frames)
        found["input_features"] = torch.randn(shape, generator=draw)
    else:
        found |= {"input_ids": tokens(), "attention_mask": mask}
    if len(model.family.stacks) > 1:
        right = torch.ones(rows, length, dtype=torch.long)
        right[-1, -2:] = 0
        found |= {"decoder_input_ids": tokens(), "decoder_attention_mask": right}
    return found


def sparse(model, pattern="2:4", sparsity=0.5):
    """Zeros in every Linear of a block, half of them negative as `weight * mask` leaves them."""
    for name, linear in prunable(model).items():
        mask = keep_largest(linear.weight.detach().abs(), pattern, sparsity, "matrix")
        linear.weight.data *= mask
        promise(model, name, pattern)
    return model
