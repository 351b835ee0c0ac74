"""Quantization: on par with the established tools, and what training adds.

    python benchmarks/quantization.py EXPERIMENT [--model MODEL] [--seeds 0 1 2]
    python benchmarks/quantization.py page

MODEL is the experiment's first unless given. Every experiment is a file of its own,
benchmarks/quantization_*.py. Cells are appended to docs/results/quantization.jsonl and skipped
where they are there; docs/results/quantization.md is made from all of them. One thread.
"""

from experiments import main

EXPERIMENTS = {
    "ptq": "quantization_ptq",
    "trained": "quantization_trained",
    "longer": "quantization_longer",
    "bytes": "quantization_bytes",
    "cost": "quantization_cost",
    "vision": "quantization_vision",
    "cache": "quantization_cache",
}

OPENING = ("quantization_goals",)

if __name__ == "__main__":
    main("quantization", "Quantization", __doc__, EXPERIMENTS, OPENING)
