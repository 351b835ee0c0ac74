"""8-bit activations in ONNX Runtime: nodes, and the very numbers of the torch operators."""

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession

from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.export import onnx as export
from compressor.export.onnx_forward import Graph
from compressor.export.onnx_twin import _IntegerLinear
from compressor.model.forward import outputs
from compressor.model.layers import QuantLinear
from compressor.model.manifest import WeightFormat
from compressor.model.probe import largest_difference
from compressor.numerics.ops import range_grid
from compressor.numerics.quantizer import quantize
from compressor.quantize import smoothquant
from compressor.run.gate import open_and_check

CASES = [("tensor", True), ("tensor", False), ("token", True)]


def layer(per, dynamic, scaled, bias, x):
    """A QuantLinear of 24 inputs and 7 outputs."""
    activation = {"bits": 8, "per": per, "dynamic": dynamic}
    form = WeightFormat(bits=8, activation=activation | ({"scaled": True} if scaled else {}))
    made = QuantLinear(24, 7, form, torch.nn.Parameter(torch.randn(7)) if bias else None)
    codes, scale, zero = quantize(torch.randn(7, 24), 8, None, True)
    parts = {"codes_OI": codes, "scale_OG": scale, "zero_OG": zero}
    if scaled:
        parts["factor_I"] = torch.rand(24) + 0.1
    if not dynamic:
        step, middle = range_grid(x.min() / 2, x.max() / 2)  # half of the range: the rest is cut
        parts |= {"input_scale": step, "input_zero": middle.to(torch.uint8)}
    made.fill(**parts)
    return made


class _FromList(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, tensors):
        return (self.layer(tensors[0]),)


@pytest.mark.parametrize(("per", "dynamic"), CASES)
@pytest.mark.parametrize(("scaled", "bias"), [(False, True), (True, False)])
def test_a_layer_gives_the_numbers_of_torch(tmp_path, per, dynamic, scaled, bias):
    x = torch.randn(3, 5, 24) * 2
    x[1, 2] = 0.0
    made = layer(per, dynamic, scaled, bias, x)
    twin = _IntegerLinear(made).eval()
    with torch.no_grad():
        wanted = made(x)
        assert torch.equal(twin(x), wanted)
        inputs = {"x": (x, {0: "batch", 1: "sequence"})}
        graph = Graph("layer.onnx", _FromList(twin).eval(), inputs, ["y"])
        export._export(graph, export.Options()).save(str(tmp_path / "layer.onnx"))
    file = onnx.load(tmp_path / "layer.onnx")
    nodes = [node.op_type for node in file.graph.node]
    static = not dynamic
    assert nodes.count("MatMulInteger") == (not static)
    assert nodes.count("DequantizeLinear") == 2 * static
    dynamic_tensor = per == "tensor" and dynamic
    assert nodes.count("DynamicQuantizeLinear") == dynamic_tensor
    assert nodes.count("QuantizeLinear") == (not dynamic_tensor)
    session = InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    stored = [onnx.numpy_helper.to_array(t) for t in file.graph.initializer]
    int8 = made.int8_weight().numpy()
    assert any(a.dtype == int8.dtype and np.array_equal(a, int8) for a in stored)
    for part in (x, x[:1, :1], x.repeat(2, 3, 1)):
        got = torch.from_numpy(session.run(None, {"x": part.numpy()})[0])
        torch.testing.assert_close(got, made(part).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "unfolded"), [("token", "scale"), ("static", "plain"), ("tensor", "scale")]
)
def test_a_smoothed_encoder_is_served(pico_bert, make_work, tmp_path, activation, unfolded):
    model = pico_bert(num_hidden_layers=1)
    settings = {"samples": 4, "length": 16, "activation": activation, "unfolded": unfolded}
    smoothquant.run(model, smoothquant.Options(**settings), make_work())
    export.run(model, export.Options(), tmp_path)
    agreement = open_and_check("onnxruntime", tmp_path, model.formats.values())
    assert agreement.ok and agreement.exact is not None, agreement
    exact, served = agreement.exact.errors, agreement.served.errors
    assert max(exact.values()) < 1e-5 < max(served.values()) < 0.1, agreement
    engine = OnnxRuntimeEngine(tmp_path, threads=1)
    ids = torch.randint(5, 96, (3, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    errors = largest_difference(
        outputs(model, batch), engine.outputs(batch), batch["attention_mask"]
    )
    assert max(errors.values()) < 0.02
    alone = {key: value[:1] for key, value in batch.items()}
    first, whole = (engine.outputs(b)["last_hidden_state"][0] for b in (alone, batch))
    if activation != "tensor":  # then a row does not depend on its neighbours
        torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-4)
