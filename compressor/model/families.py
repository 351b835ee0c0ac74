"""What differs between architectures, as data. Everything else reads this table.

Module paths are relative to `module.base_model`, so one row serves a bare encoder and the same
encoder under a task head. Adding a family is a row here plus a pico config in tests/conftest.py.
"""

from dataclasses import dataclass
from typing import Any, Literal

from compressor.errors import CompressError

ShapeRule = Literal["free", "heads divides hidden", "hidden = heads x head_dim"]


@dataclass(frozen=True)
class Stack:
    """One stack of identical blocks; paths below `blocks` are relative to a block."""

    blocks: str
    qkv: tuple[str, str, str]
    attn_out: str
    mlp_in: tuple[str, ...]  # outputs are the MLP neurons
    mlp_out: str
    norms: tuple[str, ...]  # norms over the residual stream inside a block
    cross_qkv: tuple[str, str, str] | None = None
    cross_out: str | None = None


@dataclass(frozen=True)
class Sizes:
    """The config keys that hold each size; null where the architecture has no such key."""

    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str | None = None
    head_dim: str | None = None
    mlp: str = "intermediate_size"
    vocabulary: str = "vocab_size"


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    model_type: str
    auto_class: str
    stacks: tuple[Stack, ...]
    embeddings: tuple[str, ...]  # nn.Embedding modules that write the residual stream
    norms: tuple[str, ...]  # norms over the residual stream outside the blocks
    head: str | None  # the output projection, relative to the whole module
    sizes: Sizes
    shape_rule: ShapeRule
    extras: tuple[str, ...] = ()  # other Linears on the residual stream, e.g. a pooler

    def read_sizes(self, config: Any) -> dict[str, int]:
        """Return {hidden, layers, heads, kv_heads, head_dim, mlp, vocabulary} of a config."""
        keys = self.sizes
        hidden, heads = getattr(config, keys.hidden), getattr(config, keys.heads)
        kv_heads = getattr(config, keys.kv_heads, None) if keys.kv_heads else None
        head_dim = getattr(config, keys.head_dim, None) if keys.head_dim else None
        return {
            "hidden": hidden,
            "layers": getattr(config, keys.layers),
            "heads": heads,
            "kv_heads": kv_heads or heads,
            "head_dim": head_dim or hidden // heads,
            "mlp": getattr(config, keys.mlp),
            "vocabulary": getattr(config, keys.vocabulary),
        }


LLAMA = Family(
    model_type="llama",
    auto_class="AutoModelForCausalLM",
    stacks=(
        Stack(
            blocks="layers",
            qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            attn_out="self_attn.o_proj",
            mlp_in=("mlp.gate_proj", "mlp.up_proj"),
            mlp_out="mlp.down_proj",
            norms=("input_layernorm", "post_attention_layernorm"),
        ),
    ),
    embeddings=("embed_tokens",),
    norms=("norm",),
    head="lm_head",
    sizes=Sizes(kv_heads="num_key_value_heads", head_dim="head_dim"),
    shape_rule="heads divides hidden",
)

BERT = Family(
    model_type="bert",
    auto_class="AutoModel",
    stacks=(
        Stack(
            blocks="encoder.layer",
            qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
            attn_out="attention.output.dense",
            mlp_in=("intermediate.dense",),
            mlp_out="output.dense",
            norms=("attention.output.LayerNorm", "output.LayerNorm"),
        ),
    ),
    embeddings=(
        "embeddings.word_embeddings",
        "embeddings.position_embeddings",
        "embeddings.token_type_embeddings",
    ),
    norms=("embeddings.LayerNorm",),
    head=None,
    sizes=Sizes(),
    shape_rule="hidden = heads x head_dim",
    extras=("pooler.dense",),
)

FAMILIES = {family.model_type: family for family in (LLAMA, BERT)}


def find_family(model_type: str) -> Family:
    """Return the row of an architecture.

    Raises:
        CompressError: the architecture has no row; the message names the table's fields.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    fields = ", ".join(Stack.__dataclass_fields__)
    raise CompressError(
        f"architecture '{model_type}' is not in the family table (known: {', '.join(FAMILIES)})",
        "add a row to compressor/model/families.py: model_type, auto_class, embeddings, norms, "
        f"head, sizes, shape_rule, and a Stack with {fields}",
    )
