"""Every family: cutting units out equals zero-masking them, and plain transformers loads it.

All in float64. Norms are replaced by exact ones, since those of transformers round to float32 on
the way, which would hide errors. Where attention does the same, the tolerance says so.
"""

import copy
import dataclasses
import math

import pytest
import torch
import transformers
from torch import nn

from compressor.errors import CompressError
from compressor.model.checkpoint import load_directory
from compressor.model.families import present
from compressor.model.forward import output_mask, without_cache
from compressor.model.saving import save
from compressor.model.shrink import Kept, KeptStack, rows_of, shrink
from families import CONFIGS, pico, random_inputs

HIDDEN = 24  # of 32 channels, which makes three heads of eight under every shape rule
CHANNELS = sorted({*range(0, 32, 2), *range(17, 32, 2)})[:HIDDEN]
FREE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "t5", "vit", "deit")
POST_NORM = ("bert", "roberta", "distilbert")
RMS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "t5")
# rotary tables, scores or their softmax in float32, whatever the dtype of the model
FLOAT32_INSIDE = 2e-6


def double(name, **overrides):
    model = pico(name, **overrides)
    model.module.double()
    model.source_dtype = "float64"
    return model


def inputs(model):
    batch = random_inputs(model)
    if model.family.model_type == "gemma2":
        # eager attention turns a row that may see nothing into NaN in float64: pad on the right
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@torch.no_grad()
def run(model, batch):
    result = model.module(**batch, **without_cache(model)).logits
    mask = output_mask(batch)
    return result if mask is None or result.dim() < 3 else result[mask.bool()]


def exact_norms(model, size, kept=None, count=None):
    """Replace norms over `size` channels by exact ones over the `kept` (all if None) of them.

    `count` is what mean squares are divided by; others give zero.
    """
    family = model.family
    for part in model.module.modules():
        if "Norm" not in type(part).__name__ or not hasattr(part, "weight"):
            continue
        own = part.weight.shape[0]
        channels = list(range(own)) if own != size or kept is None else kept
        divisor = count if own == size and count else len(channels)
        part.forward = _norm(part, family.norm, channels, divisor)


def _norm(part, kind, channels, divisor):
    eps = getattr(part, "variance_epsilon", getattr(part, "eps", None))
    assert eps is not None

    def forward(x):
        narrow, weight = x[..., channels], part.weight[channels]
        if kind == "layer":
            narrow = narrow - narrow.mean(dim=-1, keepdim=True)
        scale = (narrow.square().sum(dim=-1, keepdim=True) / divisor + eps).sqrt()
        narrow = narrow / scale * (1 + weight if kind == "rms plus one" else weight)
        if kind == "layer":
            narrow = narrow + part.bias[channels]
        wide = torch.zeros_like(x)
        wide[..., channels] = narrow
        return wide

    return forward


def choose(model, fewer_heads, hidden=None):
    """Other neurons and heads in every layer, and the middle layer of each stack removed."""
    stacks = []
    for stack, whole in zip(model.family.stacks, Kept.everything(model).stacks, strict=True):
        depth = len(whole.layers)
        heads = whole.heads
        if fewer_heads:
            options = (
                [[0, 2], [1, 3], [0, 3]] if grouped(model) else [[0, 1, 3], [1, 2, 3], [0, 2, 3]]
            )
            heads = [options[0 if stack.head_tables else i % 3] for i in range(depth)]
        stacks.append(
            KeptStack(
                neurons=[range(i, i + 24) for i in range(depth)],
                heads=heads,
                layers=[i for i in range(depth) if i != depth - 2],
                cross_heads=None if whole.cross_heads is None else heads[::-1],
            )
        )
    return Kept(tuple(stacks), hidden or range(model.sizes["hidden"]))


def grouped(model):
    return model.sizes["kv_heads"] < model.sizes["heads"]


@torch.no_grad()
def zero_mask(model, kept):
    """Silence what is removed: columns of output projections, and whole blocks."""
    for stack, chosen in zip(model.family.stacks, kept.stacks, strict=True):
        for i, block in enumerate(model.blocks(stack)):
            gone = i not in chosen.layers
            rows = {
                stack.mlp_out: list(chosen.neurons[i]),
                stack.attn_out: rows_of(chosen.heads[i], 8),
                stack.cross_out: rows_of(chosen.cross_heads[i], 8) if stack.cross_out else [],
            }
            for path, columns in rows.items():
                if path is not None:
                    _silence(block.get_submodule(path), [] if gone else columns, gone)
            if gone and model.family.model_type in POST_NORM:
                block.forward = lambda hidden_states, *args, **kwargs: hidden_states


def _silence(linear, columns, bias_too):
    silent = torch.ones(linear.weight.shape[1], dtype=torch.bool)
    silent[columns] = False
    linear.weight[:, silent] = 0
    if bias_too and linear.bias is not None:
        linear.bias.zero_()


def tolerance(name):
    exact = name in (*POST_NORM, "whisper", "vit", "deit", "gpt2", "opt")
    return {"atol": 1e-10 if exact else FLOAT32_INSIDE, "rtol": 0}


def check_plain_transformers(model, batch, folder, tmp_path):
    """Saved, opened by a class of transformers itself, and by us: the same numbers."""
    save(model, folder, tmp_path)
    loaded, info = type(model.module).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float64
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    plain = run(dataclasses.replace(model, module=loaded.eval()), batch)
    torch.testing.assert_close(plain, run(model, batch), atol=1e-5, rtol=0)  # norms in float32
    again = load_directory(folder)
    assert again.sizes == model.sizes
    single = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    torch.testing.assert_close(run(again, single), plain.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_neurons_heads_and_layers_equal_zero_masking(name, tmp_path):
    model = double(name)
    batch, kept = inputs(model), choose(model, fewer_heads=name in FREE)
    heads = 4 if name not in FREE else 2 if grouped(model) else 3
    masked = copy.deepcopy(model)
    zero_mask(masked, kept)
    exact_norms(masked, 32)
    wanted = run(masked, batch)
    before = run(model, batch)
    shrink(model, kept)
    folder = tmp_path / "pruned"
    folder.mkdir()
    check_plain_transformers(model, batch, folder, tmp_path)
    exact_norms(model, 32)
    torch.testing.assert_close(run(model, batch), wanted, **tolerance(name))
    assert not torch.allclose(before, wanted, atol=1e-2)  # something was removed
    assert model.sizes["heads"] == heads and model.sizes["layers"] == 2


GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


@pytest.mark.parametrize("name", GROUPED)
def test_a_whole_query_group_takes_its_key_head_along(name):
    model = double(name)
    batch, whole = inputs(model), Kept.everything(model)
    stack = dataclasses.replace(whole.stacks[0], heads=[[0, 1], [2, 3], [0, 1]])
    kept = Kept((stack,), whole.hidden)
    masked = copy.deepcopy(model)
    zero_mask(masked, kept)
    exact_norms(masked, 32)
    wanted = run(masked, batch)
    shrink(model, kept)
    exact_norms(model, 32)
    assert (model.sizes["heads"], model.sizes["kv_heads"]) == (2, 1)
    torch.testing.assert_close(run(model, batch), wanted, **tolerance(name))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_channels(name, rescale, tmp_path):
    """Against the original whose norms see the kept channels only, the others being zero.

    With `rescale`, against the original with those channels at zero and norms over all of them.
    """
    model = double(name)
    heads = name not in FREE  # those whose shape rule ties heads to hidden
    kept = choose(model, fewer_heads=heads, hidden=CHANNELS)
    batch = inputs(model)
    if rescale and name not in RMS:
        with pytest.raises(CompressError, match="has LayerNorm"):
            shrink(model, kept, rescale)
        return
    masked = copy.deepcopy(model)
    zero_mask(masked, kept)
    exact_norms(masked, 32, CHANNELS, count=32 if rescale else None)
    if name == "whisper":  # channels between its convolutions go with those of the stream
        gone = [c for c in range(32) if c not in CHANNELS]
        masked.module.model.encoder.conv2.weight.data[:, gone] = 0
    wanted = run(masked, batch)
    shrink(model, kept, rescale)
    assert model.sizes["hidden"] == HIDDEN and model.sizes["head_dim"] == 8
    folder = tmp_path / "pruned"
    folder.mkdir()
    check_plain_transformers(model, batch, folder, tmp_path)
    exact_norms(model, HIDDEN)
    torch.testing.assert_close(run(model, batch), wanted, **tolerance(name))


@pytest.mark.parametrize("name", ["t5", "gemma2", "llama"])
def test_ties_survive(name):
    model = pico(name, tie_word_embeddings=True)
    head = model.module.get_output_embeddings
    assert head().weight is model.module.get_input_embeddings().weight
    shrink(model, choose(model, fewer_heads=False, hidden=CHANNELS))
    assert head().weight is model.module.get_input_embeddings().weight


def test_the_position_bias_moves_when_the_first_block_goes():
    model = double("t5")
    batch = inputs(model)
    whole = Kept.everything(model)
    first = KeptStack(whole.stacks[0].neurons, whole.stacks[0].heads, [1, 2])
    kept = Kept((first, whole.stacks[1]), whole.hidden)
    masked = copy.deepcopy(model)
    zero_mask(masked, kept)
    exact_norms(masked, 32)
    wanted = run(masked, batch)
    shrink(model, kept)
    exact_norms(model, 32)
    torch.testing.assert_close(run(model, batch), wanted, **tolerance("t5"))
    owner = model.module.encoder.block[0].layer[0].SelfAttention
    assert owner.has_relative_attention_bias and isinstance(
        owner.relative_attention_bias, nn.Module
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_paths_of_the_table_name_what_they_say(name):
    model = pico(name, head=True)
    family = model.family
    for path in (*family.embeddings, *family.norms):
        model.base.get_submodule(path)
    for stack in family.stacks:
        for block in model.blocks(stack):
            linears = present(block, (*stack.qkv, *stack.mlp_in, stack.attn_out, stack.mlp_out))
            assert all(isinstance(linear, nn.Linear) for linear in linears.values())
            assert len(present(block, stack.norms)) == len(stack.norms)
            inputs_of_mlp = present(block, stack.mlp_in).values()
            assert {x.out_features for x in inputs_of_mlp} == {48 * stack.mlp_parts}
    if family.head:
        head = model.module.get_submodule(family.head)
        assert head is model.module.get_output_embeddings()


def test_configurations_that_tie_a_number_to_an_axis_are_refused():
    model = pico("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(CompressError, match="no layer can be removed"):
        shrink(model, choose(model, fewer_heads=False))
    model = pico("whisper", scale_embedding=True)
    with pytest.raises(CompressError, match="no hidden channel can be removed"):
        shrink(model, choose(model, fewer_heads=True, hidden=CHANNELS))


def test_transformers_classes_load_what_was_pruned_without_a_hint(tmp_path):
    """A stranger's three lines: AutoModel, a directory, go."""
    model = pico("qwen3")
    shrink(model, choose(model, fewer_heads=True, hidden=CHANNELS))
    save(model, tmp_path, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.hidden_size == HIDDEN and math.isclose(loaded.config.head_dim, 8)
