"""Our ONNX directories in OpenVINO: quantized operators, the cache, encoder-decoders, IR files."""

import json
from contextlib import closing
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import compressor
from compressor import engines
from compressor.engines import installed
from compressor.engines.generate import follow, generate
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.engines.openvino import OpenVinoEngine
from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError
from compressor.export import onnx as export
from compressor.model.forward import output_mask
from compressor.model.probe import largest_difference, read_probe
from compressor.quantize import rtn
from compressor.screen import Silent
from families import pico, random_inputs

needs_openvino = pytest.mark.skipif(not installed("openvino"), reason="openvino is not installed")
FLOAT = 1e-4  # MatMulNBits is served with float activations


def exported(model, out, **quantization):
    if quantization:
        rtn.run(model, rtn.Options(**quantization), SimpleNamespace(progress=Silent().progress))
    out.mkdir()
    export.run(model, export.Options(), out)
    return out


def errors(engine, out):
    found = {}
    for inputs, wanted in read_probe(out):
        for name, error in largest_difference(
            wanted, engine.outputs(inputs), output_mask(inputs)
        ).items():
            found[name] = max(found.get(name, 0.0), error)
    return found


@needs_openvino
def test_a_decoder_of_four_bits(tmp_path):
    model = pico("llama", num_hidden_layers=2, tie_word_embeddings=True)
    out = exported(model, tmp_path / "out", bits=4, group=16, embeddings=True)
    with closing(OpenVinoEngine(out, threads=1)) as engine:
        assert max(errors(engine, out).values()) < FLOAT
        prompt = {"input_ids": torch.tensor([[5, 17, 33, 60, 9]])}
        own = TorchEngine.of(model, out)
        torch.testing.assert_close(
            follow(engine, prompt, 9), follow(own, prompt, 9), atol=1e-4, rtol=1e-3
        )


@needs_openvino
def test_an_encoder_with_rounded_activations_and_its_own_files(tmp_path):
    model = pico("bert", num_hidden_layers=1)
    out = exported(model, tmp_path / "out", bits=8, group=None, activation="dynamic")
    onnx = max(errors(OnnxRuntimeEngine(out), out).values())
    found = max(errors(OpenVinoEngine(out), out).values())
    assert found == pytest.approx(onnx, rel=0.5) and found < 0.1
    openvino = import_module("openvino")
    openvino.save_model(openvino.Core().read_model(out / "model.onnx"), out / "model.xml", False)
    (out / "model.onnx").unlink()
    assert max(errors(OpenVinoEngine(out), out).values()) == pytest.approx(found, rel=1e-3)


@needs_openvino
def test_an_encoder_decoder_writes_what_onnx_runtime_writes(tmp_path):
    model = pico("t5")
    out = exported(model, tmp_path / "out")
    source = {k: v[1:2] for k, v in random_inputs(model).items() if "decoder" not in k}
    model.config.save_pretrained(out)
    engines = OpenVinoEngine(out), OnnxRuntimeEngine(out)
    one, other = (generate(engine, [], 8, source=source) for engine in engines)
    assert one == other


@needs_openvino
@pytest.mark.parametrize(("family", "right"), [("llama", True), ("gpt_neox", False)])
@pytest.mark.parametrize("bits", [None, 4])
def test_verify_says_whether_it_answers_as_torch_does(family, right, bits, tmp_path):
    """OpenVINO 2026.4 loads a GPT-NeoX and gets its answers wrong."""
    model = pico(family)
    model.module.save_pretrained(tmp_path / "model")
    stages = [] if bits is None else [{"quantize.rtn": {"bits": bits, "group": 16}}]
    profile = {"stages": [*stages, {"export.onnx": {}}], "measures": []}
    (tmp_path / "p.yaml").write_text(json.dumps(profile))
    made = compressor.run(str(tmp_path / "p.yaml"), str(tmp_path / "model"), out=tmp_path / "out")
    path = made.artifacts[0].path
    assert compressor.verify(path)["ok"]
    report = compressor.verify(f"openvino:{path}")
    probe = next(check for check in report["checks"] if check["name"] == "probe")
    assert report["ok"] is probe["ok"] is right, probe


@needs_openvino
def test_a_damaged_or_missing_graph(tmp_path):
    with pytest.raises(CompressError, match=r"no model\.onnx and no model\.xml"):
        OpenVinoEngine(tmp_path)
    (tmp_path / "model.onnx").write_bytes(bytes(range(256)) * 8)
    with pytest.raises(CompressError, match=r"OpenVINO cannot load model\.onnx") as error:
        OpenVinoEngine(tmp_path)
    assert error.value.hint


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda module: None)
    with pytest.raises(CompressError, match="openvino is not installed") as error:
        OpenVinoEngine(tmp_path)
    assert "pip install" in error.value.hint
