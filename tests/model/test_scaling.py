"""Scales folded into producers: the function stays, whatever cannot take one is named."""

import pytest
import torch
from torch import nn

from compressor.model.forward import outputs
from compressor.model.model import Model
from compressor.model.scaling import fold_scale, folds, unfolded
from compressor.model.side import Side, attach
from compressor.model.sparse import broken_promise
from families import CONFIGS, pico, random_inputs, sparse

# what a family's blocks cannot fold, by the ends of names; relative to one block
QKV = {"query", "key", "value", "q_lin", "k_lin", "v_lin"}
UNFOLDED = {
    "gpt2": {"mlp.c_proj"},
    "gpt_neox": {"dense_4h_to_h"},
    "bert": QKV | {"intermediate.dense", "output.dense"},
    "roberta": QKV | {"intermediate.dense", "output.dense"},
    "distilbert": QKV | {"lin1", "lin2"},
    "t5": {"EncDecAttention.k", "EncDecAttention.v"},
    "whisper": {"fc2", "encoder_attn.k_proj", "encoder_attn.v_proj"},
    "vit": {"fc2"},
    "deit": {"fc2"},
}
VARIANTS = [
    *((name, {}) for name in CONFIGS),
    ("opt", {"do_layer_norm_before": False}),
    ("t5", {"feed_forward_proj": "gated-gelu"}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("whisper", {"activation_function": "relu"}),
    ("bert", {"hidden_act": "relu"}),
    ("qwen2", {"num_key_value_heads": 1}),
]


def fold_all(model: Model) -> int:
    draw = torch.Generator().manual_seed(3)
    found = folds(model)
    for fold in found:
        s_I = torch.rand(len(fold.rows_I), generator=draw) * 3 + 0.2
        fold_scale(model, fold, fold.shared(s_I, "mean"))
    return len(found)


@pytest.mark.parametrize(("name", "given"), VARIANTS, ids=lambda v: str(v) if v else "")
def test_folding_keeps_the_function(name, given):
    model = pico(name, **given)
    batch = random_inputs(model)
    wanted = outputs(model, batch)["logits"]
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    assert fold_all(model)
    changed = {k for k, v in model.module.state_dict().items() if not torch.equal(v, before[k])}
    for fold in folds(model):
        assert {f"{n}.weight" for n in (fold.source, *fold.readers)} <= changed
    torch.testing.assert_close(outputs(model, batch)["logits"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_cannot_fold_is_named(name):
    model = pico(name)
    ends = UNFOLDED.get(name, set())
    left = unfolded(model)
    for block in [b for stack in model.family.stacks for b in model.blocks(stack)]:
        prefix = next(n for n, m in model.module.named_modules() if m is block)
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear):
                wanted = any(path.endswith(end) for end in ends)
                wanted &= path != "attention.output.dense"  # BERT's output of attention
                assert (f"{prefix}.{path}" in left) == wanted, path


def test_post_norm_opt_folds_attention_and_relu_alone():
    found = folds(pico("opt", do_layer_norm_before=False))
    assert {fold.source.rpartition(".")[2] for fold in found} == {"v_proj", "fc1"}


def test_query_heads_of_a_group_share_scales(pico_llama):
    model = pico_llama()  # 4 query heads read 2 value heads
    fold = next(f for f in folds(model) if f.source.endswith("v_proj"))
    assert fold.rows_I.view(4, 8).tolist() == [[*range(8)]] * 2 + [[*range(8, 16)]] * 2
    x_I = torch.arange(32.0)
    assert fold.shared(x_I, "amax").view(4, 8)[0].tolist() == [*range(8, 16)]
    assert fold.shared(x_I, "mean").view(4, 8)[3].tolist() == [*range(20, 28)]
    with pytest.raises(AssertionError, match="several scales"):
        fold_scale(model, fold, x_I + 1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_norm_that_is_stored_has_the_scale_that_readers_got(name):
    """After rounding to bfloat16, as a checkpoint does, only biases may move the outputs."""
    model = pico(name)
    for parameter_name, parameter in model.module.named_parameters():
        parameter.data = parameter.bfloat16().float()
        if parameter_name.endswith("bias"):
            parameter.data.zero_()
    model.source_dtype = "bfloat16"
    batch = random_inputs(model)
    wanted = outputs(model, batch)["logits"]
    fold_all(model)
    for fold in folds(model):
        module = model.module.get_submodule(fold.source)
        if not isinstance(module, nn.Linear):
            assert torch.equal(module.weight, module.weight.bfloat16().float())
    torch.testing.assert_close(outputs(model, batch)["logits"], wanted, rtol=1e-5, atol=1e-5)


def test_a_norm_weight_of_zero_keeps_its_channel(pico_llama):
    model = pico_llama()
    model.module.model.layers[0].input_layernorm.weight.data[3] = 0.0
    wanted = outputs(model, random_inputs(model))["logits"]
    fold_all(model)
    torch.testing.assert_close(
        outputs(model, random_inputs(model))["logits"], wanted, rtol=1e-5, atol=1e-5
    )


def test_patterns_survive(pico_llama):
    model = sparse(pico_llama())
    fold_all(model)
    assert not broken_promise(model, model.formats)


def test_side_paths_scale_with_their_layer(pico_llama):
    model = pico_llama()
    trained, summing = "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"
    attach(model, trained, Side(torch.randn(16, 4), torch.randn(4, 32)))
    attach(model, summing, Side(torch.randn(32, 4)))
    wanted = outputs(model, random_inputs(model))["logits"]
    assert unfolded(model) == [summing]  # sums of inputs cannot be scaled one by one
    fold_all(model)
    torch.testing.assert_close(
        outputs(model, random_inputs(model))["logits"], wanted, rtol=1e-5, atol=1e-5
    )
