"""compress: prune, distill, quantize and export Hugging Face checkpoints, with proof.

Everything here is loaded when first used, so that `import compressor` stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.engines import Engine as Engine
    from compressor.engines import open_engine as open_engine
    from compressor.engines.generate import generate as generate
    from compressor.model.checkpoint import Checkpoint as Checkpoint
    from compressor.run.benchmark import bench as bench
    from compressor.run.catalogue import list_kernels as list_kernels
    from compressor.run.catalogue import list_methods as list_methods
    from compressor.run.catalogue import list_profiles as list_profiles
    from compressor.run.inspect import inspect as inspect
    from compressor.run.loading import load_profile as load_profile
    from compressor.run.pareto import compare as compare
    from compressor.run.pipeline import RunResult as RunResult
    from compressor.run.pipeline import run as run
    from compressor.run.preflight import plan as plan
    from compressor.run.standalone import export_checkpoint as export_checkpoint
    from compressor.run.verify import verify as verify

_HOMES = {
    "Checkpoint": "model.checkpoint",
    "Engine": "engines",
    "RunResult": "run.pipeline",
    "bench": "run.benchmark",
    "compare": "run.pareto",
    "export_checkpoint": "run.standalone",
    "generate": "engines.generate",
    "inspect": "run.inspect",
    "list_kernels": "run.catalogue",
    "list_methods": "run.catalogue",
    "list_profiles": "run.catalogue",
    "load_profile": "run.loading",
    "open_engine": "engines",
    "plan": "run.preflight",
    "run": "run.pipeline",
    "verify": "run.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compressor' has no attribute '{name}'")
    value = getattr(import_module(f"compressor.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
