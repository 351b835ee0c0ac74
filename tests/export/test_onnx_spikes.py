"""Spike-driven transformers outside of compressor: ONNX Runtime, and transformers itself."""

import onnx
import pytest
import torch
from transformers import AutoModelForImageClassification

from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.export import onnx as export
from compressor.export import safetensors
from compressor.model.forward import outputs
from spiking import images, quantized


@pytest.mark.parametrize(
    ("backbone", "bits", "unrolled"), [("vit", 4, False), ("vit", 2, True), ("stages", 4, True)]
)
def test_the_file_answers_as_torch_does(backbone, bits, unrolled, tmp_path):
    model = quantized(backbone, bits=bits, unrolled=unrolled, levels=3)
    export.run(model, export.Options(), tmp_path)
    engine = OnnxRuntimeEngine(tmp_path)
    for rows in (1, 5):
        batch = images(model, rows)
        got, wanted = engine.outputs(batch)["logits"], outputs(model, batch)["logits"]
        if backbone == "vit":
            assert torch.equal(got, wanted)
        else:  # means over tokens are floats
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backbone", ["vit", "stages"])
def test_transformers_loads_the_float_export(backbone, tmp_path):
    model = quantized(backbone)
    batch = images(model)
    safetensors.run(model, safetensors.Options(), tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        got = loaded(pixel_values=batch["pixel_values"]).logits
    torch.testing.assert_close(got, outputs(model, batch)["logits"], rtol=1e-4, atol=1e-4)


def test_codes_are_packed(tmp_path):
    model = quantized("vit")
    export.run(model, export.Options(), tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    packed = [t for t in graph.initializer if t.data_type == onnx.TensorProto.UINT8]
    floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.dims]
    weights = sum(model.module.get_submodule(n).codes_OI.numel() for n in model.formats)
    assert weights / 2 <= sum(len(t.raw_data) for t in packed) < 0.8 * weights
    largest = max(model.module.get_submodule(n).codes_OI.numel() for n in model.formats)
    assert max(len(t.raw_data) // 4 for t in floats) < largest


def test_large_kernels_are_packed(tmp_path):
    """Small ones the exporter folds into floats."""
    model = quantized("stages", widths=[16, 32, 64, 96])
    export.run(model, export.Options(), tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    packed = {tuple(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.UINT8}
    assert {(96, 288), (128, 144), (32, 576)} <= packed
