"""A process that serves one candidate once and says how much memory that took.

    python -m compressor.measure.footprint '{"engine": ..., "path": ..., "inputs": ...,
                                             "threads": ..., "prefill": ...}'

It prints {"peak_memory_bytes", "baseline_bytes"}. Nothing of torch is imported for a file of ONNX
Runtime: this is the memory of a deployment that has onnxruntime and numpy only.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> dict[str, int]:
    """Load, run, report; resident bytes are read from the system (Linux)."""
    alone = {
        "onnxruntime": _serve_onnxruntime,
        "onnxruntime-genai": _serve_genai,
        "openvino": _serve_openvino,
        "llama.cpp": _serve_llama,
    }
    serve = alone.get(job["engine"], _serve_torch)
    known: dict[str, Any] = {key: value for key, value in job.items() if key != "engine"}
    if serve is _serve_torch:
        known["engine"] = job["engine"]
    baseline = serve(**known)
    return {"peak_memory_bytes": _status("VmHWM"), "baseline_bytes": baseline}


def _serve_torch(path: str, inputs: str, threads: int, prefill: bool, engine: str) -> int:
    import transformers
    from safetensors.torch import load_file

    from compressor.engines import open_engine_of

    # the classes of a family load when first named; they are code, not model
    _ = transformers.AutoModel, transformers.AutoModelForCausalLM
    batch = load_file(inputs)
    baseline = _status("VmRSS")
    served = open_engine_of(engine, Path(path), threads)
    _ = served.prefill(batch) if prefill else served.outputs(batch)
    return baseline


def _serve_llama(path: str, inputs: str, threads: int, prefill: bool) -> int:
    from safetensors.numpy import load_file

    from compressor.engines.llama_session import Session, bindings

    batch = load_file(inputs)
    bindings()
    baseline = _status("VmRSS")
    session = Session(Path(path) / "model.gguf", threads, states=not prefill)
    for tokens, real in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        session.start(1, int(real.sum()))
        session.run(0, tokens[real > 0].tolist(), 0)
    return baseline


def _serve_onnxruntime(path: str, inputs: str, threads: int, prefill: bool) -> int:
    import onnxruntime
    from safetensors.numpy import load_file

    batch = load_file(inputs)
    baseline = _status("VmRSS")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    providers = ["CPUExecutionProvider"]
    sessions = [onnxruntime.InferenceSession(str(g), settings, providers) for g in _graphs(path)]
    for session in sessions:  # what the encoder gives, the decoder reads by the same names
        feeds = _feeds({n.name: n.shape for n in session.get_inputs()}, batch)
        names = [output.name for output in session.get_outputs()]
        batch |= dict(zip(names, session.run(names, feeds), strict=True))
    return baseline


def _serve_genai(path: str, inputs: str, threads: int, prefill: bool) -> int:
    import numpy as np
    import onnxruntime_genai as og  # type: ignore[import-not-found]  # an extra
    from safetensors.numpy import load_file

    ids = load_file(inputs)["input_ids"].astype(np.int32)
    og.disable_telemetry_events()
    baseline = _status("VmRSS")
    config = og.Config(path)
    session = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)
    rows = [og.Generator(model, og.GeneratorParams(model)) for _ in ids]
    for generator, row in zip(rows, ids, strict=True):
        generator.append_tokens(row[None])
    return baseline


def _serve_openvino(path: str, inputs: str, threads: int, prefill: bool) -> int:
    import openvino  # type: ignore[import-not-found]  # an extra
    from safetensors.numpy import load_file

    batch = load_file(inputs)
    baseline = _status("VmRSS")
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    for graph in _graphs(path):
        file = graph if graph.is_file() else graph.with_suffix(".xml")
        compiled = core.compile_model(core.read_model(str(file)), "CPU", settings)
        shapes = {i.any_name: list(i.partial_shape) for i in compiled.inputs}
        found = compiled.create_infer_request().infer(_feeds(shapes, batch))
        batch |= {output.any_name: found[output] for output in compiled.outputs}
    return baseline


def _graphs(path: str) -> list[Path]:
    pair = [Path(path) / f"{name}_model.onnx" for name in ("encoder", "decoder")]
    there = any(file.is_file() for file in (pair[0], pair[0].with_suffix(".xml")))
    return pair if there else [Path(path) / "model.onnx"]


def _feeds(shapes: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a graph: those of the batch, and what follows from them."""
    return {n: batch[n] if n in batch else _made_up(n, s, batch) for n, s in shapes.items()}


def _made_up(needed: str, shape: Any, batch: dict[str, Any]) -> Any:
    """An input of the graph that no batch carries: it follows from the token ids."""
    import numpy as np

    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    assert ids is not None, f"the graph asks for {needed}"
    if needed.startswith("past_key_values."):
        heads, width = (int(str(shape[axis])) for axis in (1, 3))
        return np.zeros((len(ids), heads, 0, width), np.float32)
    if needed.endswith("position_ids"):
        return np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    assert needed == "token_type_ids", f"the graph asks for {needed}"
    return np.zeros_like(ids)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "peak memory is read from /proc"
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
