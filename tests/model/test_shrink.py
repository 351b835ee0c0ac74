"""Slicing against zero-masking and against a float64 reference; save and load with transformers."""

import copy
import dataclasses

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from compressor.model.count import count_parameters
from compressor.model.shapes import empty_model
from compressor.model.shrink import Kept, shrink

EXACT = {"atol": 1e-12, "rtol": 0}
LLAMAS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
}


def keep(model, hidden=None, **changes):
    """Keep everything of a model with one stack but what is named."""
    everything = Kept.everything(model)
    stack = dataclasses.replace(everything.stacks[0], **changes)
    return Kept((stack,), everything.hidden if hidden is None else hidden)


def rms_norm(x, weight, eps):
    return weight * x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """transformers' RMSNorm rounds to float32 on the way, which would hide (or fake) errors."""
    exact = lambda self, x: rms_norm(x, self.weight, self.variance_epsilon)  # noqa: E731
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact)


@torch.no_grad()
def run(module):
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, 96, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    output = module(input_ids=ids, attention_mask=mask)[0]
    return output[mask.bool()] if output.dim() == 3 else output


def zero_masked(model, kept):
    """The original with columns zeroed and layers bypassed: the definition of "removed"."""
    module, (kept,) = copy.deepcopy(model.module), kept.stacks
    (stack,) = model.family.stacks
    blocks = module.base_model.get_submodule(stack.blocks)
    head_dim = model.sizes["head_dim"]
    for i, block in enumerate(blocks):
        out = block.get_submodule(stack.mlp_out).weight.data
        gone = [n for n in range(out.shape[1]) if n not in kept.neurons[i]]
        out[:, gone] = 0
        heads = block.get_submodule(stack.attn_out).weight.data.unflatten(1, (-1, head_dim))
        heads[:, [h for h in range(heads.shape[1]) if h not in kept.heads[i]]] = 0
        if i not in kept.layers:
            block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    return module


def check_reload(module, tmp_path, cls):
    module.save_pretrained(tmp_path)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    torch.testing.assert_close(run(loaded.eval()), run(module), **EXACT)
    return loaded


@pytest.mark.parametrize("overrides", LLAMAS.values(), ids=LLAMAS)
def test_llama_equals_the_zero_masked_original(pico_llama, tmp_path, overrides):
    model = pico_llama(**overrides)
    model.module.double()
    kept = keep(
        model,
        neurons=[range(0, 48, 2), range(1, 25), range(24, 48)],
        heads=[[0, 3], [1, 2], [0, 2]],  # one head of each group of two
        layers=[0, 2],
    )
    wanted = run(zero_masked(model, kept))
    tied = model.module.lm_head.weight is model.module.model.embed_tokens.weight
    shrink(model, kept)
    torch.testing.assert_close(run(model.module), wanted, **EXACT)
    expected = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp": 24}
    assert model.sizes == expected | {"vocabulary": 96}
    loaded = check_reload(model.module, tmp_path, transformers.AutoModelForCausalLM)
    for module in (model.module, loaded):
        assert (module.lm_head.weight is module.model.embed_tokens.weight) == tied


def test_whole_query_groups_take_their_key_head_along(pico_llama, tmp_path):
    model = pico_llama()
    model.module.double()
    kept = keep(model, heads=[[2, 3], [0, 1], [2, 3]])
    wanted = run(zero_masked(model, kept))
    key = model.module.model.layers[0].self_attn.k_proj.weight[8:].clone()
    shrink(model, kept)
    assert (model.sizes["heads"], model.sizes["kv_heads"]) == (2, 1)
    assert torch.equal(model.module.model.layers[0].self_attn.k_proj.weight, key)
    torch.testing.assert_close(run(model.module), wanted, **EXACT)
    check_reload(model.module, tmp_path, transformers.AutoModelForCausalLM)


def test_unequal_groups_are_a_bug_of_the_caller(pico_llama):
    model = pico_llama()
    with pytest.raises(AssertionError, match="different sizes"):
        shrink(model, keep(model, heads=[[0, 1, 2]] * 3))


def test_bert_equals_the_zero_masked_original(pico_bert, tmp_path):
    model = pico_bert()
    model.module.double()
    neurons = [range(0, 64, 2), range(32), range(32, 64)]
    kept = keep(model, neurons=neurons, layers=[1, 2])
    wanted = run(zero_masked(model, kept))
    shrink(model, kept)
    torch.testing.assert_close(run(model.module), wanted, **EXACT)
    check_reload(model.module, tmp_path, transformers.AutoModel)


@torch.no_grad()
def reference_llama(module, ids, channels):
    """A llama in float64, full size, which only ever reads and writes `channels`."""
    state, config = module.state_dict(), module.config
    keep = torch.zeros(config.hidden_size, dtype=torch.float64)
    keep[channels] = 1
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def norm(x, name):  # statistics over the kept channels only
        narrow = rms_norm(x[..., channels], state[name][channels], config.rms_norm_eps)
        wide = torch.zeros_like(x)
        wide[..., channels] = narrow
        return wide

    positions = torch.arange(ids.shape[1])[None]
    cos, sin = module.model.rotary_emb(torch.zeros(1).double(), positions)

    def rotate(x):  # [B, H, S, D]
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    x = state["model.embed_tokens.weight"][ids] * keep
    future = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).double().triu(1)
    for layer in range(config.num_hidden_layers):
        weight = {
            k.removeprefix(f"model.layers.{layer}."): v
            for k, v in state.items()
            if k.startswith(f"model.layers.{layer}.")
        }
        y = norm(x, f"model.layers.{layer}.input_layernorm.weight")
        q, k, v = (
            (y @ weight[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, dim)).transpose(1, 2)
            for n in "qkv"
        )
        q, k = rotate(q), rotate(k)
        k, v = (z.repeat_interleave(heads // kv_heads, dim=1) for z in (k, v))
        scores = (q @ k.transpose(2, 3) / dim**0.5 + future).softmax(dim=-1)
        mixed = (scores @ v).transpose(1, 2).flatten(2)
        x = x + (mixed @ weight["self_attn.o_proj.weight"].T) * keep
        y = norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(y @ weight["mlp.gate_proj.weight"].T)
        up = y @ weight["mlp.up_proj.weight"].T
        x = x + ((gate * up) @ weight["mlp.down_proj.weight"].T) * keep
    return norm(x, "model.norm.weight") @ state["lm_head.weight"].T


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_channels_match_a_masked_float64_llama(pico_llama, tmp_path, tied):
    model = pico_llama(tie_word_embeddings=tied)
    model.module.double()
    ids = torch.randint(5, 96, (3, 11), generator=torch.Generator().manual_seed(7))
    channels = sorted({*range(0, 32, 3), *range(20, 32), 1})[:20]
    with torch.no_grad():
        full = reference_llama(model.module, ids, list(range(32)))
        torch.testing.assert_close(model.module(ids).logits, full, **EXACT)
        wanted = reference_llama(model.module, ids, channels)
        shrink(model, keep(model, hidden=channels))
        torch.testing.assert_close(model.module(ids).logits, wanted, **EXACT)
    assert model.sizes["hidden"] == 20 and model.sizes["head_dim"] == 8
    check_reload(model.module, tmp_path, transformers.AutoModelForCausalLM)


BERT_CLASSES = {
    None: transformers.AutoModel,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
}


@pytest.mark.parametrize("head", BERT_CLASSES)
def test_bert_hidden_and_heads_together_under_every_task_head(pico_bert, tmp_path, head):
    model = pico_bert(head)
    model.module.double()
    channels = sorted([*range(1, 32, 2), *range(0, 16, 2)])
    heads = [[0, 1, 3], [1, 2, 3], [0, 2, 3]]
    state = copy.deepcopy(model.module.state_dict())
    shrink(model, keep(model, hidden=channels, heads=heads))
    assert model.sizes == {
        "hidden": 24,
        "layers": 3,
        "heads": 3,
        "kv_heads": 3,
        "head_dim": 8,
        "mlp": 64,
        "vocabulary": 96,
    }
    prefix = "" if head is None else "bert."
    query = f"{prefix}encoder.layer.1.attention.self.query"
    rows = torch.arange(8, 32)
    small = model.module.get_submodule(query)
    assert torch.equal(small.weight, state[f"{query}.weight"][rows][:, channels])
    assert torch.equal(small.bias, state[f"{query}.bias"][rows])
    table = f"{prefix}embeddings.word_embeddings.weight"
    assert torch.equal(model.module.get_parameter(table), state[table][:, channels])
    if head == "masked-lm":
        transform = "cls.predictions.transform.dense"
        wanted = state[f"{transform}.weight"][channels][:, channels]
        assert torch.equal(model.module.get_submodule(transform).weight, wanted)
        assert model.module.cls.predictions.decoder.weight is model.module.get_parameter(table)
    check_reload(model.module, tmp_path, BERT_CLASSES[head])


def test_layers_are_renumbered_and_the_cache_works(pico_llama):
    model = pico_llama(layer_types=["full_attention"] * 3)
    shrink(model, keep(model, layers=[0, 2]))
    assert model.config.layer_types == ["full_attention"] * 2
    assert [b.self_attn.layer_idx for b in model.module.model.layers] == [0, 1]
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        whole = model.module(ids).logits[:, -1]
        cache = model.module(ids[:, :-1], use_cache=True).past_key_values
        step = model.module(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    assert len(cache.layers) == 2
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)


def test_attributes_and_gradients_are_those_of_a_fresh_model(pico_bert):
    model = pico_bert("masked-lm")
    shrink(model, keep(model, neurons=[range(16)] * 3, heads=[[1, 2]] * 3, hidden=range(16)))
    fresh = empty_model(type(model.module), model.config)
    assert repr(model.module) == repr(fresh)
    assert count_parameters(model.module) == count_parameters(fresh)
    attention = model.module.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (2, 16)
    run_with_grad = model.module(input_ids=torch.arange(5, 15)[None]).logits.sum()
    run_with_grad.backward()
    for parameter in model.module.parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape


def test_keeping_everything_changes_nothing(pico_llama):
    model = pico_llama()
    before = copy.deepcopy(model.module.state_dict())
    shrink(model, Kept.everything(model))
    after = model.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
