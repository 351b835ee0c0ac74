"""ONNX Runtime's own quantizers on our float graph of a model, scored in ONNX Runtime.

Weights alone: MatMulNBitsQuantizer (rounding to nearest, and HQQ), products in float32. W8A8:
quantize_dynamic, one scale for a whole tensor of activations. Only MatMul with a constant weight is
touched, so head and embeddings of a tied model stay float.
"""

import tempfile
from functools import cache
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import (
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from torch.nn.functional import cross_entropy

from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.export import onnx as export

FILE = "model.onnx"
FLOAT = 1  # accuracy_level of products that round no activation


@cache
def _graph(original, model):
    """A directory with the float model `original(model)`; kept while the process runs."""
    folder = Path(tempfile.mkdtemp())
    export.run(original(model), export.Options(), folder)
    return folder


def quantized(source, arm, options, folder):
    """Write `folder`/model.onnx."""
    if arm == "dynamic":
        quantize_dynamic(source, folder / FILE, op_types_to_quantize=["MatMul"])
        return
    config = None
    if arm == "HQQ":
        config = HQQWeightOnlyQuantConfig(block_size=options["group"], bits=options["bits"])
    quantizer = MatMulNBitsQuantizer(
        onnx.load(source),
        **{"bits": options["bits"], "block_size": options["group"]},
        **{"is_symmetric": options["symmetric"], "accuracy_level": FLOAT, "algo_config": config},
    )
    quantizer.process()
    onnx.save(quantizer.model.model, folder / FILE)


def outputs(original, model, arm, options, batches):
    """What the quantized model gives for every batch; `original` loads `model` by its name."""
    with tempfile.TemporaryDirectory() as folder:
        quantized(_graph(original, model) / FILE, arm, options, Path(folder))
        engine = OnnxRuntimeEngine(Path(folder), threads=1)
        return [engine.outputs(batch) for batch in batches]


def loss(found, batches):
    """Nats per token, the mean over batches, as lab.loss has it."""
    total = 0.0
    for given, batch in zip(found, batches, strict=True):
        logits, ids = given["logits"][:, :-1], batch["input_ids"][:, 1:]
        total += float(cross_entropy(logits.flatten(0, 1), ids.flatten()))
    return total / len(batches)


def embeddings(found):
    """Sentence embeddings [N, H]."""
    return torch.cat([given["sentence_embedding"] for given in found])
