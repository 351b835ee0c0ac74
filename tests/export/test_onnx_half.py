"""Weights stored as float16: half the file, tables and positions left alone, tight where exact."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.errors import CompressError
from compressor.export import onnx as export
from compressor.run.gate import EXACT, HALF, check_agreement
from families import pico

HALVED = export.Options(dtype="float16")


def exported(model, out, options=HALVED):
    out.mkdir()
    return export.run(model, options, out)


def stored(out):
    return list(onnx.load(out / "model.onnx").graph.initializer)


def judged(model, artifact, metrics=None):
    given = artifact.manifest.metrics if metrics is None else metrics
    engine = OnnxRuntimeEngine(artifact.path, threads=1)
    return check_agreement(engine, model.formats.values(), artifact.path, given)


def test_half_of_the_file_and_rounding_is_allowed_for(tmp_path):
    model = pico("llama", hidden_size=128, num_attention_heads=4, head_dim=32, num_hidden_layers=2)
    made, plain = exported(model, tmp_path / "a"), exported(model, tmp_path / "b", export.Options())
    weights = [p for p in model.module.parameters() if p.dim() >= 2]
    halves = [t for t in stored(made.path) if t.data_type == onnx.TensorProto.FLOAT16]
    assert len(halves) == len(weights) == made.manifest.metrics["float16"]["weights"]
    sizes = [(a.path / "model.onnx").stat().st_size for a in (made, plain)]
    saved = 2 * sum(p.numel() for p in weights)
    assert sizes[1] - sizes[0] == pytest.approx(saved, rel=0.02)
    known = {p.detach().half().numpy().tobytes() for p in weights}
    known |= {p.detach().t().half().contiguous().numpy().tobytes() for p in weights}
    assert all(onnx.numpy_helper.to_array(t).tobytes() in known for t in halves)
    found = judged(model, made)
    assert (
        found.ok and found.tolerance == HALF == 5e-3 and EXACT < max(found.errors.values()) < HALF
    )
    assert not judged(model, made, {}).ok  # without leave to round, it is refused
    assert "float16" not in plain.manifest.metrics and judged(model, plain).tolerance == EXACT


def test_a_checkpoint_in_float16_loses_nothing(tmp_path):
    model = pico("gpt2")  # a tied table
    for parameter in model.module.parameters():
        parameter.data = parameter.data.half().float()
    made = exported(replace(model, source_dtype="float16"), tmp_path / "a")
    assert made.manifest.metrics["float16"]["rounded"] == 0
    found = judged(model, made)
    assert found.ok and found.tolerance == EXACT and max(found.errors.values()) < 1e-5
    table = np.float16(model.module.get_input_embeddings().weight.detach().numpy()).tobytes()
    assert sum(onnx.numpy_helper.to_array(t).tobytes() == table for t in stored(made.path)) == 1


def test_a_weight_that_does_not_fit(pico_bert, tmp_path):
    model = pico_bert(num_hidden_layers=1)
    with torch.no_grad():
        model.module.encoder.layer[0].output.dense.weight[0, 0] = 7e4
    with pytest.raises(CompressError, match="70000 does not fit into float16") as error:
        exported(model, tmp_path / "a")
    assert "float16" in error.value.hint
