"""Chains of nodes that torch.onnx leaves, in the form that ONNX Runtime runs as one node or none.

x * Reciprocal(Sqrt(v))      x / Sqrt(v), which ends the pattern of an RMS norm that it fuses
Reshape(Reshape(x))          Reshape(x), or x itself where its shape was that already
"""

from typing import Any

from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import ir


def tidy(model: Any) -> None:
    """Change an exported model (onnx_ir) in place."""
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Reciprocal" and _made_by(node.inputs[0], "Sqrt"):
            _divide(node)
        elif node.op_type == "Reshape":
            _shorten(node)
    RemoveUnusedNodesPass()(model)


def _made_by(value: Any, kind: str) -> Any:
    """The node that gives a value, if it is of a kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind and node.domain == "" else None


def _divide(reciprocal: Any) -> None:
    """Products with 1 / sqrt become quotients."""
    below = reciprocal.outputs[0]
    for node, place in list(below.uses()):
        if node.op_type != "Mul":
            continue
        other = node.inputs[1 - place]
        quotient = ir.node("Div", [other, reciprocal.inputs[0]])
        old, new = node.outputs[0], quotient.outputs[0]
        new.shape, new.type = old.shape, old.type
        node.graph.insert_before(node, quotient)
        ir.convenience.replace_all_uses_with(old, new)


def _shorten(node: Any) -> None:
    """A reshape reads what the one before it reads, and goes where that has its shape."""
    before = _made_by(node.inputs[0], "Reshape")
    if before is not None:
        node.replace_input_with(0, before.inputs[0])
    source, result = node.inputs[0], node.outputs[0]
    if source.shape is not None and source.shape == result.shape and not result.is_graph_output():
        ir.convenience.replace_all_uses_with(result, source)
