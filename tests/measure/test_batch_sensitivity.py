"""Batch sensitivity: none in float, visible where a scale is shared by a whole tensor."""

import shutil

import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

from compressor.engines import open_engine_of
from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError
from compressor.measure import batch_sensitivity
from compressor.model.model import Pooling
from compressor.run.standalone import export_checkpoint

OPTIONS = batch_sensitivity.Options(rows=6, length=32)


def saved(model, path):
    model.module.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


class PerTensor:
    """Rounds its outputs to 8 bits with one scale for the whole batch."""

    name = "torch"

    def __init__(self, engine):
        self.engine, self.path = engine, engine.path

    def outputs(self, batch):
        value = self.engine.outputs(batch)["last_hidden_state"]
        # padding counts, as it does in an operator that knows nothing of masks
        step = value.abs().max() * (1 + batch["input_ids"].shape[1]) / 127
        return {"last_hidden_state": (value / step).round() * step}


def test_float_is_not_sensitive_and_a_shared_scale_is(pico_bert, make_work, tmp_path):
    model = pico_bert()
    engine = TorchEngine.of(model, saved(model, tmp_path / "a"))
    exact = batch_sensitivity.run(engine, OPTIONS, make_work())
    assert exact["batch_cosine"] == pytest.approx(1, abs=1e-6)
    assert exact["batch_cosine_min"] == pytest.approx(1, abs=1e-6) and exact["batch_cosine_n"] > 1
    rounded = batch_sensitivity.run(PerTensor(engine), OPTIONS, make_work())
    assert rounded["batch_cosine_min"] <= rounded["batch_cosine"] < 0.99


def test_dynamic_int8_of_onnx_runtime_depends_on_the_neighbours(pico_bert, make_work, tmp_path):
    source = saved(pico_bert(num_hidden_layers=2), tmp_path / "a")
    exported = export_checkpoint(str(source), to="onnx", out=tmp_path / "float").path
    int8 = tmp_path / "int8"
    shutil.copytree(exported, int8, ignore=shutil.ignore_patterns("model.onnx*"))
    quantize_dynamic(exported / "model.onnx", int8 / "model.onnx", weight_type=QuantType.QInt8)
    found = {
        path.name: batch_sensitivity.run(open_engine_of("onnxruntime", path), OPTIONS, make_work())
        for path in (exported, int8)
    }
    assert found["float"]["batch_cosine_min"] == pytest.approx(1, abs=1e-6)
    assert found["int8"]["batch_cosine_min"] < 0.9999


def test_rows_are_embedded_alone_and_among_longer_ones(pico_bert, make_work, tmp_path):
    pooled = pico_bert(pooling=Pooling("mean", True))
    shapes = []

    class Watched(PerTensor):
        def outputs(self, batch):
            shapes.append(tuple(batch["input_ids"].shape))
            assert bool(batch["attention_mask"][:, 0].all())
            return self.engine.outputs(batch)

    engine = Watched(TorchEngine.of(pooled, saved(pooled, tmp_path / "a")))
    found = batch_sensitivity.run(engine, OPTIONS, make_work())
    assert found["batch_cosine"] == pytest.approx(1, abs=1e-6)
    together = [shape for shape in shapes if shape[0] > 1]
    assert {rows for rows, _ in together} == {16} and len(shapes) - len(together) >= 3
    longest = max(length for rows, length in shapes if rows == 1)
    assert all(length >= longest for _, length in together)


def test_decoders_have_none(pico_llama, make_work, tmp_path):
    model = pico_llama()
    engine = TorchEngine.of(model, saved(model, tmp_path / "a"))
    with pytest.raises(CompressError, match="no encoder of text"):
        batch_sensitivity.run(engine, OPTIONS, make_work())
