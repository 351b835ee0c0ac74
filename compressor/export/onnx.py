"""ONNX for ONNX Runtime, from the model's own codes, through torch.export.

Weights of 8, 4 and 2 bits become MatMulNBits with int8 activations per block and
GatherBlockQuantized; formats with an activation become integer products, MatMulInteger or, on a
static grid, MatMul of DequantizeLinear; codebooks become Gather and float products
(onnx_codebook.py). Precision is what `model.formats` says; nothing is quantized here. A table
shared by embedding and head is stored once. Decoders get a KV cache (onnx_forward.py has the
inputs and outputs) and the runtime's own attention (onnx_fused.py).

The scales in the file are our float16 values as float32. The probe holds the outputs of the
model in torch, with float activations.
"""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from compressor.errors import CompressError
from compressor.export.files import artifact, write_probe_of, write_side_files
from compressor.export.onnx_forward import Graph, graphs
from compressor.export.onnx_half import store_half
from compressor.export.onnx_tidy import tidy
from compressor.export.onnx_twin import make_twin
from compressor.model.kv_cache import cache_facts, has_scales
from compressor.model.layers import float_inputs
from compressor.model.manifest import Artifact
from compressor.model.model import Model
from compressor.options import options

_LARGEST_FILE = 1_900_000_000  # bytes; a protobuf ends at 2^31, and the graph needs room too


@options
class Options:
    """How to write the graph; what is quantized comes from the quantize stage."""

    opset: int = Field(20, ge=20, le=22, description="version of the ONNX operator set")
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="how float weights are stored; products are float32"
    )
    attention: Literal["fused", "plain"] = Field(
        "fused",
        description="of decoders: nodes of ONNX Runtime, which a cache in 8 bits needs, or those "
        "of the ONNX standard",
    )


def run(model: Model, options: Options, out: Path) -> Artifact:
    """Write the graphs (model.onnx, or encoder_model.onnx and decoder_model.onnx), config,
    tokenizer and probe into a directory; large graphs get a NAME.onnx.data beside them.

    Raises:
        CompressError: ONNX Runtime has no node for a module's bits or groups, an encoder-decoder
            has no head, or see refuse_cache.
    """
    if has_scales(model):
        refuse_cache(model, options)
    twin = make_twin(model)
    with float_inputs(model.module):
        write_probe_of(model, out)
    halved: Counter[str] = Counter()
    for graph in graphs(twin, fuses(model, options)):
        program = _export(graph, options)
        _name_axes(program, graph)
        tidy(program.model)
        _strip(program.model)
        if options.dtype == "float16":
            halved.update(store_half(program, graph.module))
        size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values())
        program.save(str(out / graph.file), external_data=size > _LARGEST_FILE)
    write_side_files(model, out)
    metrics: dict[str, Any] = {"float16": dict(halved)} if halved else {}
    if has_scales(model):
        metrics["cache"] = cache_facts(model.sizes)
    return artifact(model, out, "onnxruntime", model.formats, metrics)


def fuses(model: Model, options: Options) -> bool:
    """Whether a decoder's attention becomes nodes of ONNX Runtime, which want heads of 8 N."""
    return options.attention == "fused" and model.sizes["head_dim"] % 8 == 0


def refuse_cache(model: Model, options: Options) -> None:
    """Raise CompressError where the graph could not say that keys and values are in 8 bits."""
    if not fuses(model, options):
        raise CompressError(
            "the cache of this model is in 8 bits, which nodes of the ONNX standard do not read",
            "leave attention: plain out of export.onnx, or quantize.cache out of the profile",
        )


def _export(graph: Graph, options: Options) -> Any:
    examples = [example for example, _ in graph.inputs.values()]
    free = [dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for _, axes in graph.inputs.values()]
    with warnings.catch_warnings(), torch.no_grad():
        # torch.export copies its own deprecated tree specs; no caller can do anything about it
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)
        program = torch.onnx.export(
            graph.module,
            (examples,),
            dynamo=True,
            opset_version=options.opset,
            input_names=list(graph.inputs),
            output_names=graph.outputs,
            dynamic_shapes=(free,),
            verbose=False,
        )
    assert program is not None
    return program


def _name_axes(program: Any, graph: Graph) -> None:
    """Call free axes batch, sequence, ... instead of s17; torch knows which are equal."""
    names = {
        value.shape[axis]: name
        for value, (_, axes) in zip(program.model.graph.inputs, graph.inputs.values(), strict=True)
        for axis, name in axes.items()
    }
    program.rename_axes(names)


def _strip(model: Any) -> None:
    """Drop stack traces and module paths: they hold this machine's paths and weigh a megabyte."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
