"""One-shot sparse pruning as a user meets it: which weights go, and what is refused."""

import pytest
import torch
from pydantic import TypeAdapter

from compressor.errors import CompressError
from compressor.model.sparse import broken_promise, prunable
from compressor.prune import magnitude
from families import CONFIGS, pico


def made(method, **given):
    return TypeAdapter(method.Options).validate_python(given)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("name", CONFIGS)
def test_magnitude_keeps_the_largest_of_every_layer(name, pattern, make_work):
    model, dense = pico(name), pico(name)
    magnitude.run(model, made(magnitude, pattern=pattern, sparsity=0.5), make_work())
    assert not broken_promise(model, model.formats)
    for layer, linear in prunable(dense).items():
        before, after = linear.weight.detach(), prunable(model)[layer].weight.detach()
        assert torch.equal(after[after != 0], before[after != 0])
        assert int((after == 0).sum()) == after.numel() // 2
        assert model.notes["sparsity"][layer]["sparsity"] == 0.5
        groups = (before.flatten(),) if pattern == "unstructured" else before.reshape(-1, 4)
        kept = (after.flatten(),) if pattern == "unstructured" else after.reshape(-1, 4)
        for old, new in zip(groups, kept, strict=True):
            assert old[new == 0].abs().max() <= old[new != 0].abs().min()


def test_a_weight_that_is_no_number_is_refused_by_name(pico_llama, make_work):
    model = pico_llama()
    name, linear = next(iter(prunable(model).items()))
    linear.weight.data[3, 5] = float("nan")
    with pytest.raises(CompressError, match=name):
        magnitude.run(model, made(magnitude, sparsity=0.5), make_work())


def test_layers_that_a_pattern_does_not_divide_are_refused_or_left(pico_llama, make_work):
    model = pico_llama(intermediate_size=42)
    with pytest.raises(CompressError, match="does not divide the 42 inputs"):
        magnitude.run(model, made(magnitude, pattern="2:4"), make_work())
    magnitude.run(model, made(magnitude, pattern="2:4", undivided="dense"), make_work())
    dense = [name for name in prunable(model) if name not in model.formats]
    assert len(dense) == 3 and all(name.endswith("down_proj") for name in dense)
