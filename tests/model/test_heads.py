"""Residual head merging against a float64 loop over heads, in every layout of the projections."""

import copy

import pytest
import torch

from compressor.model.heads import merge_heads, ranked_heads
from compressor.model.importance import measure_importance
from families import pico, random_inputs

# how each fused Linear [rows, in] is viewed as {part: [heads, head_dim, in]}
LAYOUTS = {
    "gpt_neox": lambda w: dict(zip("qkv", w.view(4, 3, 8, *w.shape[1:]).unbind(1), strict=True)),
    "gpt2": lambda w: {"qkv"[i]: p.view(4, 8, *p.shape[1:]) for i, p in enumerate(w.split(32))},
    "phi3": lambda w: {"q": w[:32].view(4, 8, *w.shape[1:]), "kv": w[32:]},
}


def merged(heads, ranked, stay):
    """The printed formula, one head at a time: [heads, ...] of float64."""
    heads = heads.clone()
    for group in ranked:
        count = len(group)
        for i in range(max(1, 2 * stay - count + 1), stay + 1):
            head, removed = group[i - 1], group[2 * stay - i + 1 - 1]
            heads[head] = heads[head] + (heads[head] - heads[removed])
    return heads


def projections(model, block, stack, cross):
    """{(Linear, parameter, part): [units, head_dim, ...]} of one attention, float64 copies."""
    found = {}
    paths = stack.cross_qkv if cross else stack.qkv
    for path, part in zip(paths, ("q", "k", "v"), strict=False):
        for name, parameter in block.get_submodule(path).named_parameters():
            tensor = parameter.detach().double()
            if len(paths) == 1:
                views = LAYOUTS[model.family.model_type](tensor)
            else:
                views = {part: tensor.view(-1, 8, *tensor.shape[1:])}
            found |= {(path, name, key): value.clone() for key, value in views.items()}
    return found


GROUPED = [("llama", 2), ("phi3", 2)]  # two groups of two heads keep one each
ALONE = [(n, k) for n in ("gpt2", "gpt_neox", "bert", "t5", "whisper") for k in (1, 2, 3)]


@pytest.mark.parametrize(("name", "heads"), GROUPED + ALONE)
def test_merging_equals_the_loop(name, heads):
    model = pico(name)
    before = model.sizes
    grouped = before["kv_heads"] == 2
    after = before | {"heads": heads, "kv_heads": 2 if grouped else heads}
    scores = measure_importance(model, [random_inputs(model)])
    original = copy.deepcopy(model.module)
    merge_heads(model, scores, after)
    for stack, own in zip(model.family.stacks, scores.stacks, strict=True):
        old_blocks = getattr(original, "base_model", original).get_submodule(stack.blocks)
        for i, block in enumerate(model.blocks(stack)):
            for cross in [False, True][: 1 + (own.cross_LH is not None)]:
                values = own.cross_LH[i] if cross else own.heads_LH[i]
                if name == "t5" and not cross:  # one table of position biases for all layers
                    values = own.heads_LH.sum(dim=0)
                split = [[0, 1], [2, 3]] if grouped else [[0, 1, 2, 3]]
                ranked = [sorted(group, key=lambda h: -float(values[h])) for group in split]
                was = projections(model, old_blocks[i], stack, cross)
                now = projections(model, block, stack, cross)
                assert was.keys() == now.keys()
                for key, value in was.items():
                    stays = grouped and key[2] != "q"
                    wanted = value if stays else merged(value, ranked, heads // len(ranked))
                    torch.testing.assert_close(now[key], wanted, atol=1e-6, rtol=1e-6)
                    changed = not torch.equal(value, now[key])
                    assert changed == (not stays)


def test_ranks_stay_inside_groups_that_stay():
    scores = torch.tensor([9.0, 8.0, 7.0, 1.0, 4.0, 6.0, 5.0, 0.5])
    before = {"heads": 8, "kv_heads": 2}
    assert ranked_heads(scores, before, {"heads": 4, "kv_heads": 2}) == [[0, 1, 2, 3], [5, 6, 4, 7]]
    assert ranked_heads(scores.flip(0), before, {"heads": 2, "kv_heads": 1}) == [[7, 6, 5, 4]]
    alone = {"heads": 8, "kv_heads": 8}
    assert ranked_heads(scores, alone, {"heads": 4, "kv_heads": 4})[0] == [0, 1, 2, 5, 6, 4, 3, 7]
