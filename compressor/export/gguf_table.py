"""What llama.cpp computes for each family: one row of names and values, and no code.

A row says only what differs between architectures and is not in the family table already. Adding a
family that llama.cpp knows is a row here. Sources: the graphs in src/models/ of llama.cpp and its
conversion scripts (version of llama-cpp-python 0.3.36).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
# llama.cpp has the tanh form only; beside the error function it is off by at most 5e-4
_GELU = ("gelu", *_GELU_TANH)


@dataclass(frozen=True)
class Arch:
    """One row; see the module.

    Attributes:
        name: `general.architecture`, and the prefix of the metadata.
        activation: config key of the MLP's activation, and the values that llama.cpp computes.
        permuted: Linears whose rows have the two halves of a head's rotation side by side.
        joined: the Linear with query, key and value of each head in turn, which GGUF has as all
            queries, all keys, all values.
        head: whether the output projection may be a tensor of its own, must be, or must not.
        square: there is no head size of its own: heads x head_dim is the hidden size.
        windows: layers with a sliding window are computed as such.
        scale_of_heads: layers at which attention is scaled by hidden / heads and not head_dim;
            None where the config has no say in it.
        fixed: config values that the graph takes for granted.
        values: metadata that has the value of a config key, where it is there.
        constants: metadata that is the same for all models.
    """

    name: str
    activation: tuple[str, tuple[str, ...]] = ("hidden_act", ("silu",))
    permuted: tuple[str, ...] = ()
    joined: str | None = None
    head: Literal["may", "must", "never"] = "may"
    square: bool = False
    windows: bool = False
    scale_of_heads: int | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)


_LLAMA = Arch("llama", permuted=("self_attn.q_proj", "self_attn.k_proj"))
_GEMMA2 = Arch(
    "gemma2",
    activation=("hidden_activation", _GELU_TANH),
    head="never",
    windows=True,
    scale_of_heads=46,
    fixed={"attention_bias": False},
    values={
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
)
ARCHS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Arch("qwen2", square=True),
    "qwen3": Arch("qwen3", fixed={"attention_bias": False}),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(
        _GEMMA2,
        name="gemma3",
        head="may",
        scale_of_heads=62,
        fixed={
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        values={"final_logit_softcapping": "final_logit_softcapping"},
    ),
    "phi3": Arch("phi3", square=True),
    "gpt2": Arch(
        "gpt2",
        activation=("activation_function", _GELU_TANH),
        square=True,
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "gpt_neox": Arch(
        "gptneox",
        activation=("hidden_act", _GELU),
        joined="attention.query_key_value",
        head="must",
        square=True,
        fixed={"attention_bias": True},
        values={"use_parallel_residual": "use_parallel_residual"},
    ),
    "bert": Arch(
        "bert",
        activation=("hidden_act", _GELU),
        head="never",
        square=True,
        constants={"attention.causal": False},
    ),
}
