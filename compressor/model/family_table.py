"""The family table: one row per architecture, names and no code. See families.py for the fields.

Adding a family is a row here plus a pico config in tests/families.py.
"""

from dataclasses import replace

from compressor.model.families import Family, Sizes, Stack

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA_STACK = Stack(
    blocks="layers",
    qkv=_QKV,
    attn_out="self_attn.o_proj",
    mlp_in=_GATE_UP,
    mlp_out="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm"),
    readers=(("input_layernorm", _QKV), ("post_attention_layernorm", _GATE_UP)),
)
_GROUPED = Sizes(kv_heads="num_key_value_heads", head_dim="head_dim")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

LLAMA = Family(
    model_type="llama",
    auto_class="AutoModelForCausalLM",
    stacks=(_LLAMA_STACK,),
    embeddings=("embed_tokens",),
    norms=("norm",),
    head="lm_head",
    sizes=_GROUPED,
    shape_rule="heads divides hidden",
    norm="rms",
    eps="rms_norm_eps",
)
MISTRAL = LLAMA.named("mistral", shape_rule="free")
QWEN2 = LLAMA.named("qwen2", shape_rule="free")
QWEN3 = LLAMA.named("qwen3", shape_rule="free", head_norms=_HEAD_NORMS)

_GEMMA_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
GEMMA2 = LLAMA.named(
    "gemma2",
    stacks=(
        replace(
            _LLAMA_STACK,
            norms=(*_LLAMA_STACK.norms, *_GEMMA_NORMS),
            # the other two norm what attention and MLP add to the residual stream
            readers=(("input_layernorm", _QKV), ("pre_feedforward_layernorm", _GATE_UP)),
        ),
    ),
    norm="rms plus one",
    hidden_scale="embeddings",
)
GEMMA3 = GEMMA2.named("gemma3_text", head_norms=_HEAD_NORMS)

PHI3 = LLAMA.named(
    "phi3",
    stacks=(
        replace(
            _LLAMA_STACK,
            qkv=("self_attn.qkv_proj",),
            qkv_layout="concatenated",
            mlp_in=("mlp.gate_up_proj",),
            mlp_parts=2,
            readers=(
                ("input_layernorm", ("self_attn.qkv_proj",)),
                ("post_attention_layernorm", ("mlp.gate_up_proj",)),
            ),
        ),
    ),
    shape_rule="free",
)

GPT2 = Family(
    model_type="gpt2",
    auto_class="AutoModelForCausalLM",
    stacks=(
        Stack(
            blocks="h",
            qkv=("attn.c_attn",),
            qkv_layout="concatenated",
            attn_out="attn.c_proj",
            mlp_in=("mlp.c_fc",),
            mlp_out="mlp.c_proj",
            norms=("ln_1", "ln_2"),
            readers=(("ln_1", ("attn.c_attn",)), ("ln_2", ("mlp.c_fc",))),
        ),
    ),
    embeddings=("wte", "wpe"),
    norms=("ln_f",),
    head="lm_head",
    sizes=Sizes(hidden="n_embd", layers="n_layer", heads="n_head", mlp="n_inner"),
    shape_rule="hidden = heads x head_dim",
    eps="layer_norm_epsilon",
)

OPT = Family(
    model_type="opt",
    auto_class="AutoModelForCausalLM",
    stacks=(
        Stack(
            blocks="decoder.layers",
            qkv=_QKV,
            attn_out="self_attn.out_proj",
            mlp_in=("fc1",),
            mlp_out="fc2",
            norms=("self_attn_layer_norm", "final_layer_norm"),
            readers=(("self_attn_layer_norm", _QKV), ("final_layer_norm", ("fc1",))),
            readers_if="do_layer_norm_before",
        ),
    ),
    embeddings=("decoder.embed_tokens", "decoder.embed_positions"),
    norms=("decoder.final_layer_norm",),
    head="lm_head",
    sizes=Sizes(hidden=("hidden_size", "word_embed_proj_dim"), mlp="ffn_dim"),
    shape_rule="hidden = heads x head_dim",
)

GPT_NEOX = Family(
    model_type="gpt_neox",
    auto_class="AutoModelForCausalLM",
    stacks=(
        Stack(
            blocks="layers",
            qkv=("attention.query_key_value",),
            qkv_layout="interleaved",
            attn_out="attention.dense",
            mlp_in=("mlp.dense_h_to_4h",),
            mlp_out="mlp.dense_4h_to_h",
            norms=("input_layernorm", "post_attention_layernorm"),
            readers=(  # with a parallel residual too: each norm reads the stream by itself
                ("input_layernorm", ("attention.query_key_value",)),
                ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
            ),
        ),
    ),
    embeddings=("embed_in",),
    norms=("final_layer_norm",),
    head="lm_head",
    sizes=Sizes(),
    shape_rule="hidden = heads x head_dim",
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
ROBERTA = BERT.named("roberta")

DISTILBERT = Family(
    model_type="distilbert",
    auto_class="AutoModel",
    stacks=(
        Stack(
            blocks="transformer.layer",
            qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            attn_out="attention.out_lin",
            mlp_in=("ffn.lin1",),
            mlp_out="ffn.lin2",
            norms=("sa_layer_norm", "output_layer_norm"),
        ),
    ),
    embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings"),
    norms=("embeddings.LayerNorm",),
    head=None,
    sizes=Sizes(hidden="dim", layers="n_layers", heads="n_heads", mlp="hidden_dim"),
    shape_rule="hidden = heads x head_dim",
)

_T5_QKV = ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v")
_T5_WI = tuple(f"layer.1.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1"))
_T5_DECODER_WI = tuple(f"layer.2.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1"))
_T5_ENCODER = Stack(
    blocks="encoder.block",
    qkv=_T5_QKV,
    attn_out="layer.0.SelfAttention.o",
    mlp_in=_T5_WI,
    mlp_out="layer.1.DenseReluDense.wo",
    norms=("layer.0.layer_norm", "layer.1.layer_norm"),
    readers=(("layer.0.layer_norm", _T5_QKV), ("layer.1.layer_norm", _T5_WI)),
    head_tables=("layer.0.SelfAttention.relative_attention_bias",),
)
T5 = Family(
    model_type="t5",
    auto_class="AutoModelForSeq2SeqLM",
    stacks=(
        _T5_ENCODER,
        replace(
            _T5_ENCODER,
            blocks="decoder.block",
            cross_qkv=(
                "layer.1.EncDecAttention.q",
                "layer.1.EncDecAttention.k",
                "layer.1.EncDecAttention.v",
            ),
            cross_out="layer.1.EncDecAttention.o",
            mlp_in=_T5_DECODER_WI,
            mlp_out="layer.2.DenseReluDense.wo",
            norms=("layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
            readers=(
                ("layer.0.layer_norm", _T5_QKV),
                ("layer.1.layer_norm", ("layer.1.EncDecAttention.q",)),
                ("layer.2.layer_norm", _T5_DECODER_WI),
            ),
            mask="decoder_attention_mask",
        ),
    ),
    embeddings=("shared",),
    norms=("encoder.final_layer_norm", "decoder.final_layer_norm"),
    head="lm_head",
    sizes=Sizes(
        hidden="d_model",
        layers="num_layers",
        decoder_layers="num_decoder_layers",
        heads="num_heads",
        head_dim="d_kv",
        mlp="d_ff",
    ),
    shape_rule="free",
    norm="rms",
    eps="layer_norm_epsilon",
    hidden_scale="tied head",
)

_WHISPER_READERS = (("self_attn_layer_norm", _QKV), ("final_layer_norm", ("fc1",)))
_WHISPER_ENCODER = Stack(
    blocks="encoder.layers",
    qkv=_QKV,
    attn_out="self_attn.out_proj",
    mlp_in=("fc1",),
    mlp_out="fc2",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    readers=_WHISPER_READERS,
)
WHISPER = Family(
    model_type="whisper",
    auto_class="AutoModelForSpeechSeq2Seq",
    stacks=(
        _WHISPER_ENCODER,
        replace(
            _WHISPER_ENCODER,
            blocks="decoder.layers",
            cross_qkv=("encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj"),
            cross_out="encoder_attn.out_proj",
            norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
            # keys and values of cross attention read the encoder's last norm, as all blocks do
            readers=(*_WHISPER_READERS, ("encoder_attn_layer_norm", ("encoder_attn.q_proj",))),
            mask="decoder_attention_mask",
        ),
    ),
    embeddings=("encoder.embed_positions", "decoder.embed_tokens", "decoder.embed_positions"),
    norms=("encoder.layer_norm", "decoder.layer_norm"),
    head="proj_out",
    sizes=Sizes(
        hidden="d_model",
        layers="encoder_layers",
        decoder_layers="decoder_layers",
        heads=("encoder_attention_heads", "decoder_attention_heads"),
        mlp=("encoder_ffn_dim", "decoder_ffn_dim"),
    ),
    shape_rule="hidden = heads x head_dim",
    fixed=("encoder.embed_positions",),
)

_VIT_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
VIT = Family(
    model_type="vit",
    auto_class="AutoModelForImageClassification",
    stacks=(
        Stack(
            blocks="layers",
            qkv=_VIT_QKV,
            attn_out="attention.o_proj",
            mlp_in=("mlp.fc1",),
            mlp_out="mlp.fc2",
            norms=("layernorm_before", "layernorm_after"),
            readers=(("layernorm_before", _VIT_QKV), ("layernorm_after", ("mlp.fc1",))),
        ),
    ),
    embeddings=(),
    norms=("layernorm",),
    head=None,
    sizes=Sizes(head_dim="head_dim", vocabulary=None),
    shape_rule="free",
    extras=("pooler.dense",),
)
DEIT = VIT.named("deit")

QSD_TRANSFORMER = VIT.named(  # compressor's own (qsd_modeling.py); its norms belong to neurons
    "qsd_transformer",
    stacks=(replace(VIT.stacks[0], norms=(), readers=()),),
    norms=(),
    extras=(),
    methods=("distill.ce", "distill.kd", "quantize.qsd"),
)

_ROWS = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, GPT2, OPT, GPT_NEOX),
    *(BERT, ROBERTA, DISTILBERT, T5, WHISPER, VIT, DEIT),
    QSD_TRANSFORMER,
)
FAMILIES = {family.model_type: family for family in _ROWS}
