"""Scores against direct float64 formulas, and on models whose useless units are known."""

import copy

import pytest
import torch

from compressor.model.importance import Moments, measure_importance, over_tokens

AGGREGATIONS = ("mean", "l2", "variance")


def plain(x, how):
    """One aggregation of a float64 tensor over its first axis."""
    if how == "mean":
        return x.abs().mean(dim=0)
    return x.square().sum(dim=0).sqrt() if how == "l2" else x.var(dim=0, correction=0)


@pytest.mark.parametrize("over_batch", AGGREGATIONS)
@pytest.mark.parametrize("over_sequence", AGGREGATIONS)
def test_aggregation_equals_the_formula_and_leaves_padding_out(over_batch, over_sequence):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 7, 5, generator=generator, dtype=torch.float64) * 3 + 1
    lengths = [7, 3, 1, 5, 7, 2, 6, 4, 7, 1]
    mask = (torch.arange(7)[None] < torch.tensor(lengths)[:, None]).long()
    wanted = plain(
        torch.stack([plain(x[b, :n], over_sequence) for b, n in enumerate(lengths)]), over_batch
    )
    moments = Moments()
    for rows in (slice(0, 4), slice(4, 5), slice(5, 10)):
        moments.add(over_tokens(x[rows].float(), mask[rows], over_sequence))
    torch.testing.assert_close(moments.result(over_batch).double(), wanted, rtol=1e-5, atol=1e-6)


def test_variance_survives_a_large_mean():
    moments = Moments()
    rows = 1000 + torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    for chunk in rows.split(8):
        moments.add(chunk)
    wanted = rows.double().var(dim=0, correction=0)
    torch.testing.assert_close(moments.result("variance").double(), wanted, rtol=1e-3, atol=0)


def record(model, batches):
    """Float64 inputs and outputs of every module the scores read, one sequence at a time."""
    module = copy.deepcopy(model.module).double()
    seen = {}

    def keep(name):
        def hook(_, args, kwargs, output):
            first = args[0] if args else kwargs["hidden_states"]
            output = output[0] if isinstance(output, tuple) else output
            seen.setdefault(name, []).append((first[0], output[0]))

        return hook

    (stack,) = model.family.stacks
    inside = ("", f".{stack.mlp_out}", f".{stack.attn_out}", *(f".{n}" for n in stack.norms))
    names = [f"{stack.blocks}.{i}{suffix}" for i in range(3) for suffix in inside]
    for name in [*model.family.norms, *names]:
        part = module.base_model.get_submodule(name)
        part.register_forward_hook(keep(name), with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                module.base_model(input_ids=ids[mask.bool()][None])
    return seen


def score(pairs, side):
    """sqrt of the sum over sequences of (mean over tokens of |x|) squared."""
    return torch.stack([p[side].abs().mean(dim=0) for p in pairs]).square().sum(dim=0).sqrt()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_scores_equal_the_definition_on_unpadded_sequences(family, request, make_work):
    model = request.getfixturevalue(f"pico_{family}")()
    batches = make_work().batches("calibration", 3)
    seen = record(model, batches)
    got = measure_importance(model, batches)
    norm_first = measure_importance(model, batches, head_score="heads", norms="blocks")
    (stack,), (own,) = model.family.stacks, got.stacks
    hidden = sum(score(seen[name], 1) for name in model.family.norms)
    for i in range(3):
        block = f"{stack.blocks}.{i}"
        neurons = score(seen[f"{block}.{stack.mlp_out}"], 0)
        torch.testing.assert_close(own.neurons_LM[i].double(), neurons, rtol=1e-4, atol=1e-6)
        features = score(seen[f"{block}.{stack.attn_out}"], 0)
        heads = features.unflatten(0, (4, 8)).norm(dim=1)
        torch.testing.assert_close(own.heads_LH[i].double(), heads, rtol=1e-4, atol=1e-6)
        at_tokens = [
            (before.unflatten(1, (4, 8)).norm(dim=2),)
            for before, _ in seen[f"{block}.{stack.attn_out}"]
        ]
        first = norm_first.stacks[0].heads_LH[i].double()
        torch.testing.assert_close(first, score(at_tokens, 0), rtol=1e-4, atol=1e-6)
        pairs = seen[block]
        x, y = (torch.cat([p[side] for p in pairs]) for side in (0, 1))
        cosine = (x * y).sum(dim=1) / (x.norm(dim=1) * y.norm(dim=1))
        assert float(own.layers_L[i]) == pytest.approx(1 - float(cosine.mean()), rel=1e-4)
        hidden = hidden + sum(score(seen[f"{block}.{name}"], 1) for name in stack.norms)
    torch.testing.assert_close(got.hidden_D.double(), hidden, rtol=1e-4, atol=1e-6)
    outside = sum(score(seen[name], 1) for name in model.family.norms)
    inside = norm_first.hidden_D.double()
    torch.testing.assert_close(inside, hidden - outside, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(norm_first.stacks[0].heads_LH, own.heads_LH)


def test_dead_units_rank_last(pico_llama, make_work):
    """Value rows of a key head feed the query heads [2g, 2g + 1]: the order of the groups."""
    model = pico_llama()
    with torch.no_grad():
        layer = model.module.model.layers[1]
        layer.self_attn.v_proj.weight[8:16] = 0  # group 1: query heads 2 and 3
        layer.mlp.up_proj.weight[[5, 40]] = 0
        for part in model.module.modules():
            if type(part).__name__ == "LlamaRMSNorm":
                part.weight[[3, 30]] = 0
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.module.model.layers[2].get_submodule(name).weight.zero_()
    got = measure_importance(model, make_work().batches("calibration", 2))
    (own,) = got.stacks
    assert own.heads_LH[1].argsort()[:2].sort().values.tolist() == [2, 3]
    assert own.neurons_LM[1].argsort()[:2].sort().values.tolist() == [5, 40]
    assert got.hidden_D.argsort()[:2].sort().values.tolist() == [3, 30]
    assert int(own.layers_L.argmin()) == 2
    assert float(own.layers_L[2]) == pytest.approx(0, abs=1e-5)


def test_hooks_are_gone_and_no_gradient_is_kept(pico_bert, make_work):
    model = pico_bert("sequence-classification")
    (scores,) = measure_importance(model, make_work().batches("calibration", 1)).stacks
    assert not scores.neurons_LM.requires_grad and scores.neurons_LM.dtype == torch.float32
    assert all(not part._forward_hooks for part in model.module.modules())
