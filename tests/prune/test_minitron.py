"""prune.minitron as a user meets it: budgets, refusals, and that importance beats chance."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.errors import CompressError
from compressor.model.budget import target_sizes
from compressor.model.count import count_parameters
from compressor.model.families import find_family
from compressor.model.heads import best_heads
from compressor.model.importance import Importance, StackImportance
from compressor.model.manifest import WeightFormat
from compressor.model.model import Model
from compressor.model.shapes import count
from compressor.model.shrink import shrink
from compressor.prune import minitron
from families import pico


def options(**given):
    return TypeAdapter(minitron.Options).validate_python({"samples": 16, **given})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "exactly one of parameters, sizes, bytes and ratios"),
        ({"parameters": 0.5, "bytes": 1000}, r"got parameters and bytes"),
        ({"parameters": 1.5}, "less than 1"),
        ({"parameters": 0}, "greater than 0"),
        ({"sizes": {}}, "names no size"),
        ({"sizes": {"mlp": 0}}, "greater than or equal to 1"),
        ({"sizes": {"width": 3}}, "width"),
        ({"parameters": 0.5, "batch_aggregation": "median"}, "'mean', 'l2' or 'variance'"),
    ],
)
def test_options_are_refused_with_a_sentence(given, sentence):
    with pytest.raises(ValidationError, match=sentence):
        options(**given)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_share_of_the_parameters_is_met_and_nearly_used_up(family, share, request, make_work):
    model = request.getfixturevalue(f"pico_{family}")()
    total = count_parameters(model.module)
    minitron.run(model, options(parameters=share, multiple=1), make_work())
    assert 0.9 * share < count_parameters(model.module) / total <= share
    assert model.sizes["layers"] == 3
    assert model.notes["sizes"]["after"]["parameters"] == count_parameters(model.module)


def test_bytes_are_those_of_the_saved_dtype(pico_llama, make_work, tmp_path):
    model = pico_llama()
    model.source_dtype = "bfloat16"
    minitron.run(model, options(bytes=30_000), make_work())
    model.module.bfloat16().save_pretrained(tmp_path)
    header = 8_000
    assert 25_000 < (tmp_path / "model.safetensors").stat().st_size < 30_000 + header
    with pytest.raises(CompressError, match="already takes"):
        minitron.run(pico_llama(), options(bytes=10**9), make_work())


def test_hidden_stays_while_the_rest_keeps_a_quarter(pico_llama):
    model = pico_llama(vocab_size=16)
    sizes = {
        share: target_sizes(model.family, model.config, parameters=share, multiple=1)
        for share in (0.8, 0.6, 0.1)
    }
    assert sizes[0.8]["hidden"] == sizes[0.6]["hidden"] == 32
    assert sizes[0.6]["mlp"] < sizes[0.8]["mlp"] < 48
    assert sizes[0.1]["hidden"] < 32


def test_an_impossible_budget_names_one_that_is_met(pico_bert, make_work):
    model = pico_bert()
    with pytest.raises(CompressError, match="no bert of 3 layers fits") as error:
        minitron.run(model, options(parameters=0.001), make_work())
    share = float(error.value.hint.split("parameters: ")[1].split()[0])
    minitron.run(model, options(parameters=share), make_work())
    assert model.sizes["heads"] == 1
    enough = int(error.value.hint.split("bytes: ")[1].split()[0])
    same = pico_bert()
    minitron.run(same, options(bytes=enough), make_work())
    assert same.sizes == model.sizes


@pytest.mark.parametrize(
    ("family", "sizes", "nearest"),
    [
        ("llama", {"heads": 3}, "{heads: 4, hidden: 32, kv_heads: 2}"),
        ("llama", {"kv_heads": 1}, "{heads: 2, hidden: 32, kv_heads: 1}"),
        ("llama", {"hidden": 30}, "{heads: 4, hidden: 32, kv_heads: 2}"),
        ("bert", {"heads": 2}, "{heads: 2, hidden: 16}"),
        ("bert", {"hidden": 20}, "{heads: 3, hidden: 24}"),
        ("bert", {"kv_heads": 2}, "write heads only"),
        ("llama", {"mlp": 49}, "mlp: 48 or less"),
        ("llama", {"layers": 4}, "layers: 3 or less"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_work(family, sizes, nearest, request, make_work):
    model = request.getfixturevalue(f"pico_{family}")()
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    with pytest.raises(CompressError) as error:
        minitron.run(model, options(sizes=sizes), make_work())
    assert nearest in error.value.hint
    after = model.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_axis_at_once_and_json_notes(pico_llama, make_work):
    model = pico_llama(tie_word_embeddings=True)
    wanted = {"layers": 2, "heads": 2, "kv_heads": 2, "hidden": 24, "mlp": 20}
    minitron.run(model, options(sizes=wanted), make_work())
    assert {axis: model.sizes[axis] for axis in wanted} == wanted
    assert count_parameters(model.module) == count(model.family, model.config, model.sizes)
    notes = json.loads(json.dumps(model.notes))
    assert len(notes["importance"]["layers"]) == 3 and len(notes["kept_layers"]) == 2
    neurons = notes["importance"]["neurons"]
    assert len(neurons) == 3 and all(row == sorted(row) and len(row) <= 64 for row in neurons)
    assert notes["sizes"]["before"]["mlp"] == 48 and notes["sizes"]["after"]["mlp"] == 20


def test_the_least_important_go(pico_llama, make_work):
    """Dead neurons, one dead head per group and a layer that does nothing are what is removed."""
    model = pico_llama()
    with torch.no_grad():
        first, second, idle = model.module.model.layers
        first.mlp.up_proj.weight[:16] = 0
        second.mlp.up_proj.weight[32:] = 0
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            idle.get_submodule(name).weight.zero_()
        ids = torch.arange(5, 20)[None]
        wanted = model.module(ids).logits
    minitron.run(model, options(sizes={"layers": 2, "mlp": 32}), make_work())
    assert model.notes["kept_layers"] == [0, 1]
    with torch.no_grad():
        torch.testing.assert_close(model.module(ids).logits, wanted, atol=1e-5, rtol=1e-5)


def test_heads_are_ranked_inside_their_group():
    scores = torch.tensor([9.0, 8.0, 7.0, 1.0, 4.0, 6.0, 5.0, 0.5])
    before = {"heads": 8, "kv_heads": 2}

    def best(scores, heads, kv_heads):
        return best_heads(scores, before, {"heads": heads, "kv_heads": kv_heads})

    assert best(scores, 4, 2) == [0, 1, 5, 6]
    assert best(scores, 3, 1) == [0, 1, 2]
    assert best(scores.unflatten(0, (2, 4)).flip(0).flatten(), 2, 1) == [4, 5]


def test_stored_formats_are_refused(pico_llama, make_work):
    model = pico_llama()
    model.formats["model.layers.0.mlp.up_proj"] = WeightFormat(pattern="2:4", sparsity=0.5)
    with pytest.raises(CompressError, match="weight formats of 1 modules"):
        minitron.run(model, options(parameters=0.5), make_work())


def token_windows(tokenizer, text, n, length):
    ids = tokenizer(text[: 40 * n * length], return_tensors="pt")["input_ids"][0]
    return ids[: n * length].view(n, length)


@torch.no_grad()
def perplexity(module, ids):
    return float(module(input_ids=ids, labels=ids).loss.exp())


def chance(sizes, seed):
    """Scores that rank by a coin instead of by activations."""
    draw = torch.Generator().manual_seed(seed)
    stack = StackImportance(
        neurons_LM=torch.rand(sizes["layers"], sizes["mlp"], generator=draw),
        heads_LH=torch.rand(sizes["layers"], sizes["heads"], generator=draw),
        layers_L=torch.rand(sizes["layers"], generator=draw),
    )
    return Importance((stack,), torch.rand(sizes["hidden"], generator=draw))


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_importance_beats_chance_on_a_trained_model(share, shared_data, make_work, monkeypatch):
    folder = shared_data / "checkpoints/stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (shared_data / "data/tinystories.txt").read_text(encoding="utf-8")
    windows = token_windows(tokenizer, text, 40, 128)
    calibration = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows[:32].split(8)
    ]

    def load():
        module = AutoModelForCausalLM.from_pretrained(folder).eval()
        return Model(module, find_family("llama"), tokenizer)

    work = make_work()
    object.__setattr__(work, "_batches", lambda *args, **shape: calibration)
    pruned = load()
    minitron.run(pruned, options(parameters=share), work)
    after = perplexity(pruned.module, windows[32:])
    for seed in range(2):
        other = load()
        shrink(other, minitron._keep(other, chance(other.sizes, seed), other.sizes, pruned.sizes))
        assert other.sizes == pruned.sizes
        assert after < perplexity(other.module, windows[32:])


class Bars:
    """A screen that remembers its progress bars and what went through them."""

    def __init__(self):
        self.totals, self.seen = {}, {}

    @contextmanager
    def progress(self, label, total):
        self.totals[label], self.seen[label] = total, []
        yield self.seen[label].append


@pytest.mark.parametrize("ranking", ["block_influence", "perplexity", "accuracy", "output"])
@pytest.mark.parametrize("contiguous", [False, True])
def test_layers_that_do_nothing_go_whatever_the_ranking(ranking, contiguous, make_work):
    """Two idle layers in a row cost nothing, by any measure and in any order."""
    model = pico("llama", num_hidden_layers=4)
    with torch.no_grad():
        for idle in model.module.model.layers[1:3]:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                idle.get_submodule(name).weight.zero_()
    work, bars = make_work(), Bars()
    object.__setattr__(work, "_screen", bars)
    given = options(sizes={"layers": 2}, layer_importance=ranking, contiguous=contiguous)
    minitron.run(model, given, work)
    (depth,) = model.notes["importance"]["depth"]
    assert (depth["ranking"], depth["window"]) == (ranking, 2 if contiguous else 1)
    lowest = sorted(range(len(depth["scores"])), key=depth["scores"].__getitem__)
    gone = [lowest[0], lowest[0] + 1] if contiguous else sorted(lowest[:2])
    assert model.notes["kept_layers"] == [i for i in range(4) if i not in gone]
    if ranking != "accuracy" or contiguous:  # an untrained model may get better without a layer
        assert model.notes["kept_layers"] == [0, 3]
    assert all(sum(bars.seen[label]) == total for label, total in bars.totals.items())
    passes = 0 if ranking == "block_influence" else 2 * (3 if contiguous else 4)
    assert bars.totals.get("layers", 0) == passes


def test_the_cheapest_window_goes_though_single_layers_would_differ():
    scores = StackImportance(
        torch.rand(4, 8),
        torch.rand(4, 2),
        torch.tensor([0.1, 0.9, 0.2, 0.8]),
        windows_W=torch.tensor([0.5, 0.4, 0.3]),
    )
    assert minitron._best_layers(scores, 2) == [0, 1]
    assert minitron._best_layers(replace(scores, windows_W=None), 2) == [1, 3]


def test_rankings_by_removal_take_no_pass_where_no_layer_goes(pico_llama, make_work):
    work, bars = make_work(), Bars()
    object.__setattr__(work, "_screen", bars)
    model = pico_llama()
    minitron.run(model, options(parameters=0.7, layer_importance="perplexity"), work)
    assert list(bars.totals) == ["importance"]
    assert model.notes["importance"]["depth"][0]["ranking"] == "block_influence"


PAPER = {"head_score": "heads", "merge_heads": True, "norms": "all"}


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        ("paper", PAPER | {"layer_importance": "perplexity", "multiple": 8}),
        (
            "library",
            {"head_score": "features", "merge_heads": False, "norms": "blocks", "multiple": 64}
            | {"layer_importance": "block_influence"},
        ),
        (None, {"head_score": "features", "merge_heads": False, "norms": "all", "multiple": 8}),
    ],
)
def test_a_preset_fills_in_what_is_not_given(preset, wanted):
    for make in (options, lambda **given: minitron.Options(samples=16, **given)):
        filled = make(parameters=0.5, preset=preset)
        assert {name: getattr(filled, name) for name in wanted} == wanted
        own = make(parameters=0.5, preset=preset, norms="all", multiple=3)
        assert (own.norms, own.multiple) == ("all", 3)
        plain = TypeAdapter(minitron.Options).dump_python(filled, mode="json")
        assert make(**{k: v for k, v in plain.items() if k != "samples"}) == filled
    with pytest.raises(ValidationError, match="'paper' or 'library'"):
        options(parameters=0.5, preset="book")


@pytest.mark.parametrize(
    ("name", "ratios", "wanted"),
    [
        ("llama", {"mlp": 0.5, "layers": 0.5}, {"mlp": 24, "layers": 2, "hidden": 32, "heads": 4}),
        ("llama", {"mlp": 0.7, "heads": 0.5}, {"mlp": 32, "heads": 2, "kv_heads": 2}),
        ("mistral", {"hidden": 0.7}, {"hidden": 22, "heads": 4}),
        ("llama", {"hidden": 0.7}, {"hidden": 24, "heads": 4}),
        ("bert", {"heads": 0.75}, {"heads": 3, "hidden": 24}),
        ("bert", {"hidden": 0.7}, {"heads": 3, "hidden": 24}),
        ("t5", {"layers": 0.6, "decoder_layers": 0.1}, {"layers": 2, "decoder_layers": 1}),
        ("bert", {"mlp": 0.01}, {"mlp": 8}),
    ],
)
def test_ratios_are_rounded_to_what_fits(name, ratios, wanted):
    model = pico(name)
    found = minitron._target(model, options(ratios=ratios))
    assert {axis: found[axis] for axis in wanted} == wanted


def test_ratios_are_refused_with_a_sentence():
    for ratios, sentence in (({}, "names no axis"), ({"mlp": 1.2}, "less than or equal to 1")):
        with pytest.raises(ValidationError, match=sentence):
            options(ratios=ratios)
    with pytest.raises(CompressError, match="has no decoder_layers"):
        minitron._target(pico("bert"), options(ratios={"decoder_layers": 0.5}))


def test_as_many_sequences_are_used_as_asked_for(pico_llama, make_work):
    model = pico_llama()
    minitron.run(model, options(parameters=0.5, samples=11), make_work())
    assert model.notes["calibration"] == {"asked": 11, "used": 11}
