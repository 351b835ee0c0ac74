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
        if node.op_type != "Mul" or node.outputs[0].is_graph_output():
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
    if before is not None and _takes_no_axis_over(node):
        node.replace_input_with(0, before.inputs[0])
    source, result = node.inputs[0], node.outputs[0]
    if _is_known(source.shape) and source.shape == result.shape and not result.is_graph_output():
        ir.convenience.replace_all_uses_with(result, source)


def _takes_no_axis_over(reshape: Any) -> bool:
    """Whether a 0 in the shape it asks for would be a 0, and not an axis of its input."""
    attribute = reshape.attributes.get("allowzero")
    return attribute is not None and attribute.as_int() == 1


def _is_known(shape: Any) -> bool:
    """Whether every axis has a number or a name; two axes of neither need not be equal."""
    return shape is not None and all(isinstance(axis, int) or axis.value for axis in shape)
