"""What a method is made of: a changed file of it is another method, a changed stranger is not."""

import shutil
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import TypeAdapter, ValidationError

import compressor
from compressor.run.methods import load_method, method_hash


def test_the_defaults_that_are_listed_are_those_of_the_options():
    checked = 0
    for method in compressor.list_methods():
        options = load_method(method["name"]).Options
        with suppress(ValidationError):  # a budget, say, has no default
            made = TypeAdapter(options).dump_python(options(), mode="json")
            for option, said in method["options"].items():
                first, _, rest = option.partition(".")
                if rest and made[first] is None:  # left out as a whole
                    continue
                value = made[first][rest] if rest else made[first]
                empty = value == {} and said["default"] is None
                assert empty or value == said["default"], (method["name"], option)
                checked += 1
    assert checked > 300


@pytest.fixture
def copied(tmp_path):
    """Factory: a method out of a copy of the package, and that copy's folder."""

    def copy(method):
        folder = tmp_path / "compressor"
        shutil.copytree(Path(compressor.__file__).parent, folder)
        module = ModuleType(method)
        module.__file__ = str(folder / f"{method.replace('.', '/')}.py")
        module.Options = load_method(method).Options
        return module, folder

    return copy


@pytest.mark.parametrize(
    ("method", "inside", "outside"),
    [
        (
            "prune.minitron",
            ["prune/minitron", "prune/cutting", "prune/damage", "distill/predictions"],
            ["prune/__init__", "prune/wanda", "distill/kd", "model/shrink", "run/search"],
        ),
        (
            "prune.ast",
            ["prune/adaptive", "prune/sparsity", "distill/ce", "distill/logits", "distill/runner"],
            ["prune/wanda", "distill/kd"],
        ),
        (
            "prune.squarehead",
            ["prune/rounds", "prune/sparsegpt", "distill/squarehead", "distill/states"],
            ["prune/ast", "distill/kd"],
        ),
        (
            "distill.ce",
            ["distill/ce", "distill/predictions", "distill/runner"],
            ["distill/kd", "distill/logits", "prune/ast"],
        ),
        ("distill.kd", ["distill/kd", "distill/logits", "distill/runner"], ["distill/latent"]),
        ("distill.minitron", ["distill/minitron", "distill/states"], ["distill/kd"]),
        (
            "quantize.smoothquant",
            ["quantize/rescaled", "quantize/activations", "quantize/weights"],
            ["quantize/awq", "model/scaling"],
        ),
        (
            "quantize.distilled",
            ["quantize/trained", "quantize/weights", "distill/logits", "distill/runner"],
            ["quantize/rtn", "quantize/points", "distill/kd"],
        ),
        (
            "quantize.differentiable",
            ["quantize/trained", "quantize/points", "distill/logits", "distill/runner"],
            ["quantize/rtn", "quantize/distilled"],
        ),
        ("export.onnx", ["export/onnx", "export/onnx_pair"], ["export/safetensors"]),
        ("search.minitron", ["prune/cutting", "distill/runner"], ["distill/kd"]),
    ],
)
def test_every_file_of_a_method_counts_and_no_other(copied, method, inside, outside):
    module, folder = copied(method)
    hashes = [method_hash(module)]
    assert hashes == [method_hash(load_method(method))], "the place counts"
    for name in inside:
        with (folder / f"{name}.py").open("a") as file:
            file.write("# changed\n")
        hashes.append(method_hash(module))
    assert len(set(hashes)) == len(inside) + 1
    for name in outside:
        with (folder / f"{name}.py").open("a") as file:
            file.write("# changed\n")
    assert method_hash(module) == hashes[-1]
