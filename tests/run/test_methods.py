"""What a method is made of: a changed file of it is another method, a changed stranger is not."""

import shutil
from pathlib import Path
from types import ModuleType

import pytest

import compressor
from compressor.run.methods import load_method, method_hash


@pytest.fixture
def copied(tmp_path):
    """Factory: a method out of a copy of its folder, and that folder."""

    def copy(method):
        kind, _, name = method.partition(".")
        folder = tmp_path / kind
        shutil.copytree(Path(compressor.__file__).parent / kind, folder)
        module = ModuleType(name)
        module.__file__ = str(folder / f"{name}.py")
        return module, folder

    return copy


@pytest.mark.parametrize(
    ("method", "inside", "outside"),
    [
        ("prune.minitron", ["minitron", "cutting", "scores", "damage"], ["__init__"]),
        ("distill.kd", ["kd", "logits", "runner"], ["minitron", "latent"]),
        ("distill.minitron", ["minitron", "logits", "states"], ["kd", "latent"]),
        ("export.onnx", ["onnx", "onnx_twin", "onnx_pair"], ["safetensors"]),
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
