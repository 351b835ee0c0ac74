"""The attention and the norms of ONNX Runtime, and graphs that do without them."""

from collections import Counter

import onnx
import pytest
import torch

from compressor.engines.generate import follow
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.engines.torch import TorchEngine
from compressor.export import onnx as export
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
