"""The attention and the norms of ONNX Runtime, and graphs that do without them."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from onnxscript import ir

from compressor.engines.generate import follow
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.engines.torch import TorchEngine
from compressor.export import onnx as export
from compressor.export.onnx_tidy import tidy
from families import pico

FUSED = ("GroupQueryAttention", "RotaryEmbedding")


def exported(model, out, **options):
    """The nodes of the graph, by name, and the engine that serves it."""
    export.run(model, export.Options(**options), out)
    graph = onnx.load(out / "model.onnx").graph
    return Counter(node.op_type for node in graph.node), OnnxRuntimeEngine(out)


@pytest.mark.parametrize(
    ("changes", "attention", "fused"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, "fused", True),
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, "plain", False),
        ({"head_dim": 6}, "fused", False),  # the node takes heads of 8, 16, ...
    ],
)
def test_the_same_text_with_and_without(changes, attention, fused, tmp_path):
    model = pico("llama", **changes)
    nodes, engine = exported(model, tmp_path, attention=attention)
    layers = model.sizes["layers"]
    wanted = {"GroupQueryAttention": layers, "RotaryEmbedding": 2 * layers}
    assert {name: nodes[name] for name in FUSED} == (wanted if fused else dict.fromkeys(FUSED, 0))
    torch.manual_seed(0)
    prompt = {"input_ids": torch.randint(5, 60, (3, 6))}
    own = TorchEngine.of(model, tmp_path)
    torch.testing.assert_close(
        follow(engine, prompt, 9), follow(own, prompt, 9), atol=1e-5, rtol=1e-4
    )


def test_several_tokens_behind_a_cache(tmp_path):
    """As a loop does that takes a prompt in pieces; of one row with the fused node."""
    model = pico("llama")
    _, engine = exported(model, tmp_path)
    ids = torch.randint(5, 60, (1, 9))
    whole = engine.outputs({"input_ids": ids})["logits"]
    first, cache = engine.prefill({"input_ids": ids[:, :4]})
    rest, _ = engine.decode(ids[:, 4:], cache)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole, atol=1e-5, rtol=1e-4)


def test_a_row_is_reshaped_no_more_than_it_must_be(tmp_path):
    """Heads stay flat between projections and attention, and every norm has the fused form."""
    model = pico("llama")
    nodes, engine = exported(model, tmp_path)
    engine.close()
    assert nodes["Reciprocal"] == 0 and nodes["Div"] == 2 * model.sizes["layers"] + 1
    assert nodes["Transpose"] <= 1 and nodes["Reshape"] <= 4
    assert nodes["Concat"] < model.sizes["layers"] + 6  # no cache is put together


def graph(nodes, outputs, known=True):
    """A graph x [2, N, 8] -> outputs, as torch.onnx hands it over."""
    axes = [2, "n", 8] if known else [None, None, None]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, axes)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.array(v), k) for k, v in SHAPES.items()],
        value_info=[helper.make_tensor_value_info("b", TensorProto.FLOAT, axes)],
    )
    imports = [helper.make_opsetid("", 20)]
    return helper.make_model(made, opset_imports=imports, ir_version=10)


SHAPES = {"flat": [2, -1], "cube": [2, -1, 8], "over": [0, 2, -1], "eight": [-1, 8]}


def reshape(source, shape, result, allowzero=1):
    return helper.make_node("Reshape", [source, shape], [result], allowzero=allowzero)


CASES = {  # nodes, outputs, Reshapes that are left
    "a chain that ends where it began": (
        [
            reshape("x", "flat", "a"),
            reshape("a", "cube", "b"),
            helper.make_node("Neg", ["b"], ["y"]),
        ],
        *(["y"], 0),
    ),
    "an output keeps its node": ([reshape("x", "flat", "a"), reshape("a", "cube", "b")], ["b"], 1),
    "an axis that is taken over": (
        [reshape("x", "eight", "a"), reshape("a", "over", "c", allowzero=0)],
        *(["c"], 2),
    ),
}


@pytest.mark.parametrize(("nodes", "outputs", "left"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("known", [True, False])
def test_tidy_changes_no_answer(nodes, outputs, left, known):
    before = graph(nodes, outputs, known)
    model = ir.from_proto(before)
    tidy(model)
    after = ir.to_proto(model)
    x = np.arange(2 * 4 * 8, dtype=np.float32).reshape(2, 4, 8)
    wanted, got = (
        InferenceSession(m.SerializeToString()).run(None, {"x": x}) for m in (before, after)
    )
    assert all(map(np.array_equal, wanted, got))
    if known:
        assert sum(node.op_type == "Reshape" for node in after.graph.node) == left


def test_a_quotient_that_is_an_output_is_left_alone():
    nodes = [
        helper.make_node("Sqrt", ["x"], ["s"]),
        helper.make_node("Reciprocal", ["s"], ["r"]),
        helper.make_node("Mul", ["r", "x"], ["m"]),
        helper.make_node("Mul", ["x", "r"], ["p"]),
        helper.make_node("Neg", ["p"], ["y"]),
    ]
    before = graph(nodes, ["m", "y"])
    model = ir.from_proto(before)
    tidy(model)
    x = np.arange(1, 65, dtype=np.float32).reshape(2, 4, 8)
    wanted, got = (
        InferenceSession(m.SerializeToString()).run(None, {"x": x})
        for m in (before, ir.to_proto(model))
    )
    for mine, theirs in zip(wanted, got, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    assert [node.op_type for node in model.graph].count("Div") == 1
