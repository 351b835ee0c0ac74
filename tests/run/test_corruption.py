"""One number or one key of a finished artefact changes: verify says where.

Two kinds of damage: the file changed afterwards, so that its digest is wrong, and the file was
written wrong in the first place, so that its digest is right and only the probe can tell.
"""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import compressor
from compressor.errors import CompressError
from compressor.model.manifest import list_files, read_manifest, write_manifest
from compressor.run.parts import changed, parts_of
from compressor.run.standalone import export_checkpoint
from families import pico

PARTS = ((0, "first"), (1, "second"))
TARGETS = ("onnx", "compressed_tensors", "safetensors")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A 4-bit pico Llama, exported to every target: {target: directory}."""
    home = tmp_path_factory.mktemp("corruption")
    model = pico("llama", num_hidden_layers=1)
    model.module.save_pretrained(home / "model")
    profile = home / "p.yaml"
    profile.write_text(
        "stages: [{quantize.rtn: {bits: 4, group: 16, embeddings: false, head: false}}]\n"
    )
    made = compressor.run(profile, model=str(home / "model"), out=home / "run").checkpoint.path
    found = {to: export_checkpoint(str(made), to=to, out=home / to).path for to in TARGETS}
    return found | {"run": made}


def change_tensor(directory, part):
    """Change one number of the first tensor whose name holds `part`; returns the file's name."""
    file = directory / "model.safetensors"
    if not file.is_file():
        return change_initializer(directory, part)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if part in n)
    flat = tensors[name].view(-1)
    flat[0] = flat[0] * 2 + 9
    save_file(tensors, file, header)
    return file.name


def change_initializer(directory, part):
    """The same of an ONNX graph: a table of codes (uint8) or a float tensor of scales."""
    file = directory / "model.onnx"
    model = onnx.load(file)
    kind = np.uint8 if part == "packed" else np.float32
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits")
    names = [i for i in node.input[1:] if i]
    tensor = next(
        t
        for t in model.graph.initializer
        if t.name in names and numpy_helper.to_array(t).dtype == kind
    )
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] = array.flat[0] ^ 0x0F if kind is np.uint8 else array.flat[0] * 2 + 9
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, file)
    return file.name


def change_config(directory, _):
    """One key of config.json: how much is added to a variance."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["rms_norm_eps"] = 0.5
    file.write_text(json.dumps(config))
    return file.name


DAMAGE = [
    *[(to, change_tensor, "packed") for to in TARGETS[:2]],
    *[(to, change_tensor, "scale") for to in TARGETS[:2]],
    ("safetensors", change_tensor, "q_proj.weight"),
    *[(to, change_config, "rms_norm_eps") for to in TARGETS],
]


@pytest.mark.parametrize(("to", "change", "part"), DAMAGE)
def test_verify_names_what_changed_afterwards(artifacts, tmp_path, to, change, part):
    copy = tmp_path / to
    shutil.copytree(artifacts[to], copy)
    assert compressor.verify(copy)["ok"]
    name = change(copy, part)
    checks = compressor.verify(copy)["checks"]
    wrong = [check["name"] for check in checks if not check["ok"] and check["name"] != "probe"]
    assert name in wrong and set(wrong) <= {name, "formats"}
    detail = next(check["detail"] for check in checks if check["name"] == name)
    assert re.search(rf": '[^']*{part}[^']*' changed, 1 in all", detail), detail


def test_verify_names_a_tensor_in_external_data(tmp_path):
    """The bytes lie in another file than the names."""
    tensors = [numpy_helper.from_array(np.arange(512, dtype=np.float32) + i, n) for i, n in PARTS]
    graph = onnx.helper.make_graph([], "g", [], [], tensors)
    file = tmp_path / "model.onnx"
    onnx.save(
        onnx.helper.make_model(graph), file, save_as_external_data=True, location="model.onnx.data"
    )
    stated = parts_of(tmp_path)
    assert list(stated) == ["model.onnx"] and changed(tmp_path, "model.onnx.data", stated) == ""
    data = tmp_path / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    assert changed(tmp_path, "model.onnx.data", stated) == "'second' changed, 1 in all"


def test_what_changed_is_not_exported(artifacts, tmp_path):
    """The probe of an artefact is made from what is loaded, so it would agree with itself."""
    copy = tmp_path / "made"
    shutil.copytree(artifacts["run"], copy)
    export_checkpoint(str(copy), to="safetensors", out=tmp_path / "first")
    change_config(copy, None)
    with pytest.raises(CompressError, match=r"config.json' is not as it was written") as caught:
        export_checkpoint(str(copy), to="safetensors", out=tmp_path / "second")
    assert "compress verify" in caught.value.hint and not (tmp_path / "second").exists()


def test_a_damaged_header_is_no_crash(artifacts, tmp_path):
    copy = tmp_path / "made"
    shutil.copytree(artifacts["safetensors"], copy)
    file = copy / "model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    checks = {check["name"]: check for check in compressor.verify(copy)["checks"]}
    assert checks[file.name]["detail"] == "its content changed (sha256)"


@pytest.mark.parametrize(
    ("to", "change", "part"), [d for d in DAMAGE if d[:2] != ("onnx", change_config)]
)
def test_the_probe_finds_what_was_written_wrong(artifacts, tmp_path, to, change, part):
    """ONNX Runtime reads no config.json: there the digest alone can tell."""
    copy = tmp_path / to
    shutil.copytree(artifacts[to], copy)
    change(copy, part)
    (copy / "manifest.json").rename(tmp_path / "manifest.json")
    manifest = replace(read_manifest(tmp_path), files=list_files(copy))
    write_manifest(copy, manifest)
    checks = {check["name"]: check for check in compressor.verify(copy)["checks"]}
    assert not checks["probe"]["ok"] and "is off by" in checks["probe"]["detail"]
    assert all(check["ok"] for name, check in checks.items() if name not in ("probe", "formats"))
