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
    serve = _serve_onnxruntime if job["engine"] == "onnxruntime" else _serve_torch
    baseline = serve(**{key: value for key, value in job.items() if key != "engine"})
    return {"peak_memory_bytes": _status("VmHWM"), "baseline_bytes": baseline}


def _serve_torch(path: str, inputs: str, threads: int, prefill: bool) -> int:
    import transformers
    from safetensors.torch import load_file

    from compressor.engines.torch import TorchEngine

    # the classes of a family load when first named; they are code, not model
    _ = transformers.AutoModel, transformers.AutoModelForCausalLM
    batch = load_file(inputs)
    baseline = _status("VmRSS")
    engine = TorchEngine(Path(path), threads)
    _ = engine.prefill(batch) if prefill else engine.outputs(batch)
    return baseline


def _serve_onnxruntime(path: str, inputs: str, threads: int, prefill: bool) -> int:
    import onnxruntime
    from safetensors.numpy import load_file

    batch = load_file(inputs)
    baseline = _status("VmRSS")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        f"{path}/model.onnx", settings, providers=["CPUExecutionProvider"]
    )
    feeds = {
        needed.name: batch[needed.name] if needed.name in batch else _made_up(needed, batch)
        for needed in session.get_inputs()
    }
    session.run(None, feeds)
    return baseline


def _made_up(needed: Any, batch: dict[str, Any]) -> Any:
    """An input of the graph that no batch carries: it follows from the token ids."""
    import numpy as np

    rows, length = batch["input_ids"].shape
    if needed.name.startswith("past_key_values."):
        _, heads, _, width = needed.shape
        return np.zeros((rows, heads, 0, width), np.float32)
    if needed.name == "position_ids":
        return np.tile(np.arange(length), (rows, 1))
    assert needed.name == "token_type_ids", f"the graph asks for {needed.name}"
    return np.zeros((rows, length), np.int64)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "peak memory is read from /proc"
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
