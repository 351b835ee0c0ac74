"""Candidates of a search: against brute force over whole empty models, and what is refused."""

import math
from itertools import product

import pytest
import yaml

from compressor.errors import CompressError
from compressor.model.budget import LEAST
from compressor.model.candidates import (
    Counts,
    candidates_for,
    grid,
    label,
    spread,
    within_budget,
)
from compressor.model.shapes import axes_of, count, fits
from compressor.search.minitron import Options
from families import CONFIGS
from families import pico as unsaved


def pico(name, **overrides):
    """A pico model whose config names its class, as that of every saved checkpoint does."""
    model = unsaved(name, **overrides)
    model.config.architectures = [type(model.module).__name__]
    return model


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_counts_of_a_grid_are_those_of_whole_empty_models(name):
    model = pico(name)
    counts, space = Counts(model.family, model.config), Options(parameters=0.5)
    shapes = grid(model.family, model.config, space)
    assert shapes[0] == model.sizes
    for shape in spread(model.sizes, shapes, 4):
        for mlp in (3, 24, 48):
            wanted = count(model.family, model.config, shape | {"mlp": mlp})
            assert counts(shape | {"mlp": mlp}) == wanted


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "t5"])
def test_lists_and_a_budget_give_what_brute_force_gives(name):
    model = pico(name)
    lists = {"layers": (3, 2), "heads": (4, 2, 1), "hidden": (32, 24, 16, 8), "mlp": (48, 40, 16)}
    space = Options(parameters=0.6, tolerance=0.2, **lists)
    total, wanted = count(model.family, model.config, model.sizes), []
    decoders = (2,) if "decoder_layers" in model.sizes else (None,)
    for chosen in product(*lists.values()):
        for deep in decoders:
            shape = model.sizes | dict(zip(lists, chosen, strict=True))
            shape |= {"decoder_layers": deep} if deep else {}
            if model.sizes["kv_heads"] == model.sizes["heads"]:
                shape["kv_heads"] = shape["heads"]
            if not fits(model.family, model.sizes, shape):
                continue
            if abs(count(model.family, model.config, shape) / int(0.6 * total) - 1) <= 0.2:
                wanted.append(shape)
    found = within_budget(model.family, model.config, space)
    assert wanted and sorted(map(label, found)) == sorted(map(label, wanted))


@pytest.mark.parametrize("name", ["llama", "bert", "whisper"])
def test_a_filled_mlp_is_the_multiple_nearest_to_the_budget(name):
    model = pico(name)
    space = Options(parameters=0.7, multiple=2, tolerance=0.05)
    budget = int(0.7 * count(model.family, model.config, model.sizes))
    whole = model.sizes["mlp"]
    found = within_budget(model.family, model.config, space)
    for shape in found:
        sizes = [
            count(model.family, model.config, shape | {"mlp": mlp})
            for mlp in range(2, whole + 1, 2)
        ]
        least = min(abs(size - budget) for size in sizes)
        own = count(model.family, model.config, shape)
        assert abs(own - budget) == least <= 0.05 * budget
        assert shape["mlp"] % 2 == 0
    wide = {shape["mlp"] >= LEAST * whole for shape in found}
    assert len(wide) == 1  # thin ones only where there are no others
    assert len({label(shape) for shape in found}) == len(found)


def test_bytes_are_parameters_in_the_stored_dtype():
    model = pico("llama")
    total = count(model.family, model.config, model.sizes)
    size = 4 * int(0.6 * total)
    by_bytes, by_share = Options(bytes=size), Options(parameters=0.6)
    found = [within_budget(model.family, model.config, space) for space in (by_bytes, by_share)]
    assert found[0] == found[1]
    with pytest.raises(CompressError, match="already takes"):
        within_budget(model.family, model.config, Options(bytes=4 * total))


def test_each_shape_taken_is_the_farthest_from_those_before():
    model = pico("qwen2")
    shapes = grid(model.family, model.config, Options(parameters=0.5))
    few, more = spread(model.sizes, shapes, 4), spread(model.sizes, shapes, 6)
    assert more[:4] == few

    def gap(shape, taken):
        logs = [
            [math.log(s[a] / shape[a]) for a in axes_of(shape) if a != "kv_heads"] for s in taken
        ]
        return min(math.hypot(*differences) for differences in logs)

    for i in range(1, 6):
        best = max(gap(s, more[:i]) for s in shapes)
        assert gap(more[i], more[:i]) == pytest.approx(best)
    assert spread(model.sizes, shapes, 10_000) == sorted(
        shapes, key=lambda s: spread(model.sizes, shapes, 10_000).index(s)
    )


def test_a_budget_out_of_reach_names_the_nearest_which_then_works():
    model = pico("bert")
    with pytest.raises(CompressError) as caught:
        candidates_for(model.family, model.config, Options(parameters=0.02))
    assert "no shape in these lists is within 5.0% of" in caught.value.what
    share = float(caught.value.hint.partition("write parameters: ")[2].partition(",")[0])
    nearest = caught.value.hint.partition("the nearest, ")[2].partition(",")[0]
    found = candidates_for(model.family, model.config, Options(parameters=share))
    assert nearest in map(label, found)


@pytest.mark.parametrize(
    ("name", "lists", "what"),
    [
        ("llama", {"layers": (4,)}, r"layers: 4 is outside 1 \.\. 3"),
        ("gpt2", {"kv_heads": (2,)}, "gpt2 has no kv_heads"),
        ("llama", {"decoder_layers": (2,)}, "no encoder-decoder"),
        ("gpt2", {"hidden": (24,), "heads": (2,)}, "no combination of the lists"),
    ],
)
def test_impossible_lists_are_refused(name, lists, what):
    model = pico(name)
    with pytest.raises(CompressError, match=what):
        grid(model.family, model.config, Options(parameters=0.5, **lists))


@pytest.mark.parametrize(
    ("name", "sizes", "lists", "reason"),
    [
        # 3 heads divide 24 channels; they do not divide among 4 key heads
        ("llama", {"heads": 8, "kv_heads": 4}, {"heads": (3,), "hidden": (24,)}, "the kv_heads"),
        ("gpt2", {}, {"heads": (3,), "hidden": (32,)}, "hidden must be heads x 8"),
    ],
)
def test_lists_that_do_not_fit_give_the_rule_that_fails_and_shapes_that_do_fit(
    name, sizes, lists, reason
):
    keys = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    model = pico(name, **{keys[axis]: size for axis, size in sizes.items()})
    with pytest.raises(CompressError) as caught:
        grid(model.family, model.config, Options(parameters=0.5, **lists))
    rules = ("the kv_heads", "hidden must be", "divide hidden")
    broken = [rule for rule in rules if rule in caught.value.what]
    assert len(broken) == 1 and reason.startswith(broken[0])
    shapes = [yaml.safe_load(s) for s in caught.value.hint.partition(": ")[2].split(" or ")]
    assert len(shapes) == 3
    for shape in shapes:
        fitting = {axis: (size,) for axis, size in shape.items()}
        assert grid(model.family, model.config, Options(parameters=0.5, **fitting))


def test_what_the_model_ties_to_a_number_is_not_cut_by_default():
    model = pico("whisper", scale_embedding=True)
    shapes = grid(model.family, model.config, Options(parameters=0.9))
    assert {shape["hidden"] for shape in shapes} == {32}
    model = pico("gpt2", scale_attn_by_inverse_layer_idx=True)
    shapes = grid(model.family, model.config, Options(parameters=0.9))
    assert {shape["layers"] for shape in shapes} == {3}
