"""What there is to choose from: methods, shipped profiles, kernels."""

from typing import Any

from compressor.run.loading import load_profile, shipped_profiles
from compressor.run.methods import all_methods, describe


def list_methods(name: str | None = None) -> list[dict[str, Any]]:
    """Describe one method, or all: name, paper, summary, options {k: {type, default}}.

    Raises:
        CompressError: there is no method of that name.
    """
    return [describe(method) for method in ([name] if name else all_methods())]


def list_profiles() -> list[dict[str, Any]]:
    """Shipped profiles: name, description and the methods of their stages."""
    loaded = [load_profile(name) for name in shipped_profiles()]
    return [
        {"name": p.name, "description": p.description, "stages": [s.method for s in p.stages]}
        for p in loaded
    ]


def list_kernels() -> list[dict[str, str]]:
    """Every op with the implementation this machine runs: [{op, implementation, reason}]."""
    from compressor.numerics.ops import OPS

    reason = "no faster kernel is installed; the PyTorch reference runs"
    return [{"op": op, "implementation": "reference", "reason": reason} for op in OPS]
