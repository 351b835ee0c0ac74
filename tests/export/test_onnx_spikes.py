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

WIDE = {"widths": [16, 32, 64, 96]}  # kernels that are not so small that the exporter folds them


def check_packed(tensors, model, bits):
    """Codes take their bits, and no large matrix is there in floats."""
    packed = [t for t in tensors if t.data_type == onnx.TensorProto.UINT8]
    floats = [t for t in tensors if t.data_type == onnx.TensorProto.FLOAT and t.dims]
    codes = [model.module.get_submodule(name).codes_OI.numel() for name in model.formats]
    least = sum(codes) * bits / 8
    assert 0.8 * least <= sum(len(t.raw_data) for t in packed) < 1.6 * least
    assert max(len(t.raw_data) // 4 for t in floats) < max(codes)


@pytest.mark.parametrize(
    ("backbone", "bits", "unrolled", "more"),
    [("vit", 4, False, {}), ("vit", 2, True, {}), ("stages", 4, False, WIDE)],
)
def test_the_file_answers_as_torch_does(backbone, bits, unrolled, more, tmp_path):
    model = quantized(backbone, bits=bits, unrolled=unrolled, levels=3, **more)
    export.run(model, export.Options(), tmp_path)
    check_packed(onnx.load(tmp_path / "model.onnx").graph.initializer, model, bits)
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
