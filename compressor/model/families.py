"""What a row of the family table says. The rows are in family_table.py; everything else reads them.

Module paths are relative to `module.base_model`, so one row serves a bare encoder and the same
encoder under a task head. Paths that an architecture has only in some versions (T5's gated MLP)
are all listed; `present` picks those that a block has.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from compressor.errors import CompressError

ShapeRule = Literal["free", "heads divides hidden", "hidden = heads x head_dim"]
QkvLayout = Literal["separate", "concatenated", "interleaved"]


@dataclass(frozen=True)
class Stack:
    """One stack of identical blocks; paths below `blocks` are relative to a block.

    Attributes:
        qkv: one path for each of query, key and value, or the one path of a fused Linear.
        qkv_layout: rows of a fused Linear: all queries, then all keys, then all values
            (concatenated), or query, key and value of each head in turn (interleaved).
        mlp_in: Linears whose outputs are the MLP neurons.
        mlp_parts: how many such Linears each of `mlp_in` holds, one after the other.
        norms: norms over the residual stream inside a block.
        head_tables: embeddings [any, heads] that the first block alone owns (T5's position bias).
        mask: batch key of the tokens this stack reads; without that key all are real.
        readers: (norm of a block, the Linears that read its output), where nothing else does.
            Not for post-norm blocks, where the residual stream itself is that output, nor for
            norms whose output is added to it.
        readers_if: config key that must be true for `readers` to hold.
    """

    blocks: str
    qkv: tuple[str, ...]
    attn_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    norms: tuple[str, ...]
    cross_qkv: tuple[str, str, str] | None = None
    cross_out: str | None = None
    qkv_layout: QkvLayout = "separate"
    mlp_parts: int = 1
    head_tables: tuple[str, ...] = ()
    mask: str = "attention_mask"
    readers: tuple[tuple[str, tuple[str, ...]], ...] = ()
    readers_if: str | None = None


@dataclass(frozen=True)
class Sizes:
    """The config keys that hold each size; null where the architecture has no such key.

    A tuple names keys that always hold the same value.
    """

    hidden: str | tuple[str, ...] = "hidden_size"
    layers: str = "num_hidden_layers"  # of the first stack
    decoder_layers: str | None = None  # of the second stack
    heads: str | tuple[str, ...] = "num_attention_heads"
    kv_heads: str | None = None
    head_dim: str | None = None
    mlp: str | tuple[str, ...] = "intermediate_size"
    vocabulary: str | None = "vocab_size"


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        embeddings: nn.Embedding modules that write the residual stream.
        norms: norms over the residual stream outside the blocks.
        head: the output projection, relative to the whole module.
        norm: what the norms compute: LayerNorm, x/rms * w, or x/rms * (1 + w).
        eps: config key of the norms' epsilon.
        head_norms: norms over the features of a head, relative to a block.
        hidden_scale: what the code multiplies by a power of the hidden size: the output of the
            embeddings (by its root) or the input of a tied head (by one over its root).
        extras: other Linears on the residual stream, e.g. a pooler.
        fixed: modules that are never trained, e.g. a table of sinusoids.
        methods: the only stages, exports aside, that know the architecture; empty: all do.
    """

    model_type: str
    auto_class: str
    stacks: tuple[Stack, ...]
    embeddings: tuple[str, ...]
    norms: tuple[str, ...]
    head: str | None
    sizes: Sizes
    shape_rule: ShapeRule
    norm: Literal["layer", "rms", "rms plus one"] = "layer"
    eps: str = "layer_norm_eps"
    head_norms: tuple[str, ...] = ()
    hidden_scale: Literal["none", "embeddings", "tied head"] = "none"
    extras: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()

    def read_sizes(self, config: Any) -> dict[str, int]:
        """Sizes of a config: {hidden, layers, heads, kv_heads, head_dim, mlp, vocabulary}.

        An encoder-decoder also has decoder_layers; vocabulary is 0 for images.

        Raises:
            CompressError: keys that must hold the same value do not.
        """
        keys = self.sizes
        hidden, heads = self.read(config, keys.hidden), self.read(config, keys.heads)
        kv_heads = getattr(config, keys.kv_heads, None) if keys.kv_heads else None
        head_dim = getattr(config, keys.head_dim, None) if keys.head_dim else None
        depth = {"layers": getattr(config, keys.layers)}
        if keys.decoder_layers:
            depth["decoder_layers"] = getattr(config, keys.decoder_layers)
        return {
            "hidden": hidden,
            **depth,
            "heads": heads,
            "kv_heads": kv_heads or heads,
            "head_dim": head_dim or hidden // heads,
            "mlp": self.read(config, keys.mlp) or 4 * hidden,  # GPT-2 leaves it out
            "vocabulary": getattr(config, keys.vocabulary) if keys.vocabulary else 0,
        }

    def read(self, config: Any, keys: str | tuple[str, ...]) -> Any:
        """The value that a config key, or several equal ones, hold."""
        values = {key: getattr(config, key) for key in ([keys] if isinstance(keys, str) else keys)}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{key} {value}" for key, value in values.items())
            raise CompressError(
                f"this {self.model_type} has {shown}, which are expected to be equal",
                "use a checkpoint where they are",
            )
        return next(iter(values.values()))

    def stack_of(self, path: str) -> Stack:
        """The stack that a module outside the blocks belongs to, by the first part of its path."""
        first, single = path.partition(".")[0], len(self.stacks) == 1
        return next(s for s in self.stacks if single or s.blocks.partition(".")[0] == first)

    def named(self, model_type: str, **changes: Any) -> "Family":
        """The same row under another name."""
        return replace(self, model_type=model_type, **changes)


def present(block: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """{path: module} of the listed paths that a block has."""
    inside = dict(block.named_modules())
    return {path: inside[path] for path in paths if path in inside}


def find_family(model_type: str) -> Family:
    """Return the row of an architecture.

    Raises:
        CompressError: the architecture has no row; the message names the table's fields.
    """
    from compressor.model.family_table import FAMILIES

    if model_type in FAMILIES:
        return FAMILIES[model_type]
    fields = ", ".join(Stack.__dataclass_fields__)
    raise CompressError(
        f"architecture '{model_type}' is not in the family table (known: {', '.join(FAMILIES)})",
        "add a row to compressor/model/family_table.py: model_type, auto_class, embeddings, norms, "
        f"head, sizes, shape_rule, and a Stack with {fields}",
    )
