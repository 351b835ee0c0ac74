"""Codebooks and few bits in ONNX Runtime: our codes in the file, the numbers of torch."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.errors import CompressError
from compressor.export import onnx as export
from compressor.export.onnx_codebook import Codebook
from compressor.export.onnx_twin import make_twin
from compressor.model.manifest import WeightFormat
from compressor.model.tables import QuantTable
from compressor.numerics.codebook import in_buckets, nearest, out_of_buckets
from compressor.numerics.packing import pack
from compressor.quantize import nf4, rtn
from compressor.quantize.weights import place, targets, weight_of
from compressor.run.gate import open_and_check


def learned(model, points, flat, offset):
    """Quantize to evenly spread points, whatever their number, as a method that learns them."""
    bits = (points - 1).bit_length()
    options = rtn.Options(bits=4, group=None if flat else 16)
    form = {"codebook": "learned", "points": points, "flat": bool(flat), "symmetric": not offset}
    grid = torch.linspace(0.0 if offset else -1.0, 1.0, points)
    for target in targets(model, options):
        w = weight_of(model, target.name)
        buckets = in_buckets(w, w.shape[1] // 16, flat)
        low = buckets.amin(-1) if offset else torch.zeros(buckets.shape[:-1])
        scale = buckets.amax(-1) - low if offset else buckets.abs().amax(-1)
        scale = scale.half().clamp(min=1e-3)
        parts = {"scale": scale, "points_P": grid}
        if offset:
            parts["offset"] = low.half()
        values = (buckets - low.half().float()[..., None]) / scale.float()[..., None]
        codes = nearest(values.contiguous(), grid)
        parts["codes_OI"] = out_of_buckets(codes, w.shape, flat)
        where = type(target)(target.names, bits, flat or 16)
        place(model, where, parts, **form)


def agree(model, out):
    out.mkdir()
    export.run(model, export.Options(), out)
    found = open_and_check("onnxruntime", out, model.formats.values())
    assert found.ok, found.failure
    return found


def stored(out):
    graph = onnx.load(out / "model.onnx").graph
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer}


def test_nf4_lies_packed_in_the_file(pico_bert, make_work, tmp_path):
    model = pico_bert(num_hidden_layers=1, intermediate_size=1024)
    nf4.run(model, nf4.Options(group=16), make_work())
    found = agree(model, tmp_path / "out")
    assert found.served_tolerance < 1e-3 and found.exact is None  # float activations anyway
    name = "encoder.layer.0.intermediate.dense"
    layer = model.module.get_submodule(name)
    assert isinstance(layer, QuantTable)
    codes = [a for a in stored(tmp_path / "out").values() if a.shape == (1024, 16)]
    assert any(np.array_equal(a, pack(layer.codes_OI, 4).numpy()) for a in codes)
    kinds = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert "MatMulNBits" not in kinds and {"Gather", "MatMul"} <= kinds


def test_a_tied_table_of_nf4_is_stored_once(pico_llama, make_work, tmp_path):
    model = pico_llama(tie_word_embeddings=True, vocab_size=20_000, num_hidden_layers=1)
    nf4.run(model, nf4.Options(group=16), make_work())
    agree(model, tmp_path / "out")
    size, per_row = (tmp_path / "out" / "model.onnx").stat().st_size, 32 // 2 + 2 * 4
    assert 20_000 * per_row < size < 20_000 * per_row * 1.1 + 150_000
    engine = OnnxRuntimeEngine(tmp_path / "out", threads=1)
    logits, cache = engine.prefill({"input_ids": torch.arange(5, 15)[None]})
    assert engine.decode(logits[:, -1:].argmax(-1), cache)[0].shape == (1, 1, 20_000)


# two codes in a byte, in rows; one code in a byte, in buckets that end inside rows, the last short
@pytest.mark.parametrize(("points", "offset", "flat"), [(16, True, None), (5, False, 40)])
def test_learned_points(pico_bert, tmp_path, points, offset, flat):
    model = pico_bert(num_hidden_layers=1)
    learned(model, points, flat, offset)
    bits = {form.bits for form in model.formats.values()}
    assert bits == {(points - 1).bit_length()}
    assert max(agree(model, tmp_path / "out").errors.values()) < 1e-5


@pytest.mark.parametrize("points", [2, 4, 16, 5, 40, 200])
@pytest.mark.parametrize("flat", [None, 40])
def test_the_twin_dequantizes_as_we_do(pico_bert, points, flat):
    model = pico_bert(num_hidden_layers=1)
    learned(model, points, flat, True)
    for module in model.module.modules():
        if isinstance(module, QuantTable):
            table = Codebook(module)
            ids = torch.tensor([[3, 0], [7, 31]]) % len(module.codes_OI)
            assert torch.equal(table.weight(), module.weight)
            assert torch.equal(table.rows(ids), module.weight[ids])
            in_a_byte = {2: 8, 4: 4, 16: 2}.get(points, 1)
            assert table.packed.shape[1] == -(-module.codes_OI.shape[1] // in_a_byte)


@pytest.mark.parametrize(("symmetric", "tied"), [(True, False), (False, True)])
def test_two_bits(pico_llama, make_work, tmp_path, symmetric, tied):
    model = pico_llama(num_hidden_layers=1, tie_word_embeddings=tied)
    rtn.run(model, rtn.Options(bits=2, group=16, symmetric=symmetric), make_work())
    found = agree(model, tmp_path / "out")
    assert found.exact is not None and max(found.errors.values()) < 1e-5
    nodes = onnx.load(tmp_path / "out" / "model.onnx").graph.node
    bits = [a.i for node in nodes for a in node.attribute if a.name == "bits"]
    assert set(bits) == {2} and len(bits) == 9  # seven in the block, head, embedding


def test_three_bits_are_refused(pico_llama, make_work):
    model = pico_llama(num_hidden_layers=1)
    rtn.run(model, rtn.Options(bits=3, group=16), make_work())
    with pytest.raises(CompressError, match="serves weights of 8, 4 and 2 bits") as error:
        make_twin(model)
    assert "open_engine" in error.value.hint and "export.safetensors" in error.value.hint


def test_float_layers_are_left_alone(pico_bert):
    model = pico_bert()
    model.formats["encoder.layer.0.output.dense"] = WeightFormat(pattern="2:4", sparsity=0.5)
    twin = make_twin(model)
    assert isinstance(twin.module.get_submodule("encoder.layer.0.output.dense"), nn.Linear)
