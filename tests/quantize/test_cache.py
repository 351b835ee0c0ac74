"""The key-value cache in 8 bits: scales by hand, attention by hand, and in ONNX Runtime."""

import dataclasses

import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from compressor.engines.generate import follow
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError
from compressor.export import onnx as export
from compressor.model.checkpoint import load_directory
from compressor.model.kv_cache import attentions, scales_of
from compressor.model.saving import save
from compressor.model.sources import CACHE
from compressor.quantize import cache
from compressor.run.gate import check_agreement
from families import pico

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")
DECODERS += ("gpt_neox", "opt")
OPTIONS = cache.Options(samples=6, length=12)


def calibrated(model, make_work, padded=2):
    """The model after the stage; the first rows are padded on the right."""
    work = make_work(batch=6, length=12)

    def batches(split, n, **shape):
        found = work.batches(split, n, **shape)
        for batch in found:
            batch["attention_mask"][:2, -padded:] = 0
        return found

    cache.run(model, OPTIONS, dataclasses.replace(work, _batches=batches))
    return model, batches("calibration", 1, batch=6, length=12)[0]


class Rounding(DynamicLayer):
    """A layer that rounds what is written into it, by the formula in float64."""

    scales = ()

    def update(self, key_states, value_states, *args, **kwargs):
        pair = zip((key_states, value_states), self.scales, strict=True)
        return super().update(*(by_hand(x, s) for x, s in pair))


def by_hand(x_BKSD, scale_KD):
    s = scale_KD.double()[None, :, None]
    return ((x_BKSD.double() / s).round().clamp(-128, 127) * s).float()


def rounding_cache(scales):
    found = DynamicCache()
    for pair in scales:
        layer = Rounding()
        layer.scales = pair
        found.layers.append(layer)
    return found


@pytest.mark.parametrize("family", DECODERS)
def test_scales_and_attention_are_those_of_the_formula(family, make_work):
    plain = pico(family)
    model, batch = calibrated(pico(family), make_work)
    seen = DynamicCache()
    with torch.no_grad():
        plain.module(**batch, past_key_values=seen, use_cache=True)
    real = batch["attention_mask"].bool()
    scales = [scales_of(m) for m in attentions(model)]
    for layer, (key, value) in zip(seen.layers, scales, strict=True):
        for x_BKSD, scale_KD in ((layer.keys, key), (layer.values, value)):
            largest_KD = x_BKSD.transpose(1, 2)[real].abs().amax(dim=0)
            torch.testing.assert_close(scale_KD, largest_KD / 127)
    plain.module.set_attn_implementation("eager")
    inputs = {"input_ids": batch["input_ids"][2:]}
    with torch.no_grad():
        wanted = plain.module(**inputs, past_key_values=rounding_cache(scales), use_cache=True)
        float_one = plain.module(**inputs)
        got = model.module(**inputs)
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-4, rtol=1e-3)
    moved = (got.logits - float_one.logits).abs().max()
    assert moved > 10 * (got.logits - wanted.logits).abs().max()


def test_the_file_comes_back(make_work, tmp_path):
    model, batch = calibrated(pico("llama"), make_work)
    (tmp_path / "parent").mkdir()
    save(model, tmp_path, tmp_path / "parent")
    loaded = load_directory(tmp_path)
    for mine, theirs in zip(attentions(model), attentions(loaded), strict=True):
        assert all(map(torch.equal, scales_of(mine), scales_of(theirs)))
    assert torch.equal(
        loaded.module(**batch).logits, model.module(**batch).logits
    )  # the same code, the same bits
    (tmp_path / CACHE).write_bytes((tmp_path / CACHE).read_bytes()[:-9])
    with pytest.raises(CompressError, match="cache"):
        load_directory(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # whose scores have a soft cap
def test_onnx_runtime_keeps_and_reads_codes(family, make_work, tmp_path):
    model, _ = calibrated(pico(family), make_work)
    made = export.run(model, export.Options(), tmp_path)
    sizes, told = model.sizes, made.manifest.metrics
    numbers = 2 * sizes["layers"] * sizes["kv_heads"] * sizes["head_dim"]
    assert told["cache"]["bytes_per_token"] == {"float32": 4 * numbers, "int8": numbers}
    engine = OnnxRuntimeEngine(tmp_path)
    agreement = check_agreement(engine, [], tmp_path, told)
    assert agreement.ok, agreement.failure
    ids = torch.randint(5, 60, (3, 7))
    _, kept = engine.prefill({"input_ids": ids})
    assert all(value.numpy().dtype == "int8" for value in kept.values.values())
    served, wanted, unrounded = (
        follow(e, {"input_ids": ids}, 8)
        for e in (
            engine,
            TorchEngine.of(model, tmp_path),
            TorchEngine.of(pico(family), tmp_path),
        )
    )
    # a key that lies between two codes may fall to either
    assert (served - wanted).norm() < 0.2 * (unrounded - wanted).norm()


def test_the_gate_sees_a_wrong_scale(make_work, tmp_path):
    model, _ = calibrated(pico("llama"), make_work)
    metrics = export.run(model, export.Options(), tmp_path).manifest.metrics
    graph = onnx.load(tmp_path / "model.onnx")
    node = next(n for n in graph.graph.node if n.op_type == "GroupQueryAttention")
    scale = next(t for t in graph.graph.initializer if t.name == node.input[12])
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, scale.name))
    onnx.save(graph, tmp_path / "model.onnx")
    assert (
        "is off by" in check_agreement(OnnxRuntimeEngine(tmp_path), [], tmp_path, metrics).failure
    )


def test_what_has_no_such_cache_is_refused():
    for family, said in (("bert", "fill-mask"), ("t5", "seq2seq")):
        with pytest.raises(CompressError, match=said):
            cache.refuse(pico(family))
    with pytest.raises(CompressError, match="multiple of 8"):
        cache.refuse(pico("llama", head_dim=6))
