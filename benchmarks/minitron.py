"""Minitron (arXiv 2407.14679): do its findings hold on models that train in minutes on one core?

    python benchmarks/minitron.py EXPERIMENT [--model MODEL] [--seeds 0 1 2]
    python benchmarks/minitron.py page

MODEL is "stories260K, whole stories" unless given, "stories260K" (the file of stories as it is) or
"novels-llama". Every experiment is a file of its own, benchmarks/minitron_*.py. Cells are appended
to docs/results/minitron.jsonl and skipped where they are there; docs/results/minitron.md is made
from all of them. Training runs in float32 on one thread. Where several seeds were run, ranges are
over seeds, and two arms are called apart only where their ranges do not overlap; of a single seed
the numbers are compared as they are.
"""

from experiments import main

EXPERIMENTS = {
    "zero-shot": "minitron_zero_shot",
    "aggregation": "minitron_aggregation",
    "recovery": "minitron_recovery",
    "longer": "minitron_longer",
    "axes": "minitron_axes",
    "variants": "minitron_variants",
    "search": "minitron_search",
    "encoder": "minitron_encoder",
    "cost": "minitron_cost",
    "search-cost": "minitron_search_cost",
}

if __name__ == "__main__":
    main("minitron", "Minitron", __doc__, EXPERIMENTS)
