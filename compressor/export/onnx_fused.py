"""Attention of a decoder in the fused nodes of ONNX Runtime.

    RotaryEmbedding       turns queries and keys by their positions
    GroupQueryAttention   appends keys and values to the cache and attends, heads in their groups

As single nodes the same takes a Concat of the whole cache and an Expand of every shared head at
each step, and two dozen small nodes a layer, which are most of the time of a small model's token.
The code of transformers stays what is traced: it calls `attention` by its registered name, `rotary`
in the place of its own function, and a cache whose layers hold the past only.

Which tokens count is a float mask, added to the scores, so rows may be padded on either side. The
length of a row with its past is that of attention_mask, never of the cache, which a runtime may
have made longer than it is. A cache in 8 bits (quantize.cache) is read and written as it is.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic, symbolic_multi_out
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import eager_mask

from compressor.model.kv_cache import BITS, scales_of

NAME = "compress_fused"  # of the attention, for transformers
_ROTARY = "apply_rotary_pos_emb"
_GRID = "PER_CHANNEL"  # of a cache in 8 bits
_HIDDEN = -1e9  # score of what a token may not see; of float32's least two would be minus infinity


class _Past(DynamicLayer):
    """The past of a layer; `attention` puts what it returns in its place.

    Attributes:
        tokens: of a row with its past, and of these only the new ones.
        last_B, length: the same as the node wants it, int32: a row's last place, and a scalar.
    """

    def __init__(self, keys: Tensor, values: Tensor, mask_BT: Tensor, new: int) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        rows, total = mask_BT.shape
        self.tokens = total, new
        self.last_B = torch.ones(rows, dtype=torch.int32) * (total - 1)
        self.length = torch.ones((), dtype=torch.int32) * total

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens[0], 0

    def get_seq_length(self) -> int:
        return self.tokens[0] - self.tokens[1]


_cache: list[_Past] = []  # of the forward that is traced: attention knows its layer's number


def past(tensors: Sequence[Tensor], ids_BS: Tensor, mask_BT: Tensor) -> Any:
    """A cache of keys and values, two for each layer, [batch, kv_heads, past, head_dim]."""
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    _cache[:] = [_Past(k, v, mask_BT, ids_BS.shape[1]) for k, v in pairs]
    found: Any = DynamicCache()
    found.layers = list(_cache)
    return found


def attention(
    module: nn.Module,
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask_B1ST: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls an attention function: [batch, tokens, heads, head_dim]."""
    layer: Any = _cache[module.layer_idx]  # type: ignore[index]
    rows, heads, new, width = q_BHSD.shape
    shared, total = k_BKSD.shape[1], layer.tokens[0]
    flat = [x.transpose(1, 2).flatten(2) for x in (q_BHSD, k_BKSD, v_BKSD)]
    rest = [layer.keys, layer.values, layer.last_B, layer.length, None, None, None, mask_B1ST]
    settings = {
        "num_heads": heads,
        "kv_num_heads": shared,
        "scale": float(width**-0.5 if scaling is None else scaling),
        **({"softcap": float(softcap)} if softcap else {}),
    }
    scales, kept = scales_of(module), q_BHSD.dtype
    if scales is not None:
        rest += [None, *(scale_KD.flatten() for scale_KD in scales)]
        settings |= {"k_quant_type": _GRID, "v_quant_type": _GRID, "kv_cache_bit_width": BITS}
        kept = torch.int8
    y_BSI, layer.keys, layer.values = symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [*flat, *rest],
        settings,
        dtypes=(q_BHSD.dtype, kept, kept),
        shapes=((rows, new, heads * width), *[(rows, shared, total, width)] * 2),
        version=1,
    )
    return y_BSI.view(rows, new, heads, width), None


def rotary(
    q_BHSD: Tensor, k_BKSD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """The first R channels of a head turned in pairs (i, i + R/2), as transformers does.

    The node takes cos and sin from a table by position; here the table is that of these tokens.
    """
    rows, _, new, width = q_BHSD.shape
    turned = cos_BSR.shape[-1]
    tables = [x[..., : turned // 2].reshape(-1, turned // 2) for x in (cos_BSR, sin_BSR)]
    places_BS = torch.arange(rows * new).view(rows, new)

    def turn(x_BHSD: Tensor) -> Tensor:
        heads = x_BHSD.shape[1]
        flat = x_BHSD.transpose(1, 2).flatten(2)
        part = 0 if turned == width else turned  # 0: the whole head
        y_BSI = symbolic(
            "com.microsoft::RotaryEmbedding",
            (flat, places_BS, *tables),
            {"num_heads": heads, "interleaved": 0, "rotary_embedding_dim": part},
            dtype=flat.dtype,
            shape=flat.shape,
            version=1,
        )
        return y_BSI.view(rows, new, heads, width).transpose(1, 2)

    return turn(q_BHSD), turn(k_BKSD)


def _mask(*given: Any, **named: Any) -> Tensor:
    return eager_mask(*given, **named).clamp(min=_HIDDEN)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def fused(module: nn.Module) -> Iterator[None]:
    """Inside, the code of `module`, a decoder of transformers, is traced with these functions."""
    code = sys.modules[type(module).__module__]
    before = getattr(code, _ROTARY, None)
    module.set_attn_implementation(NAME)  # type: ignore[operator]
    if before is not None:
        setattr(code, _ROTARY, rotary)
    try:
        yield
    finally:
        _cache.clear()
        if before is not None:
            setattr(code, _ROTARY, before)
