"""Sparsity: do AST (arXiv 2407.20584) and SquareHead (2310.06927) hold on small models?

    python benchmarks/sparsity.py EXPERIMENT [--model MODEL] [--seeds 0 1 2]
    python benchmarks/sparsity.py page

MODEL is the experiment's first unless given. Every experiment is a file of its own,
benchmarks/sparsity_*.py. Cells are appended to docs/results/sparsity.jsonl and skipped
where they are there; docs/results/sparsity.md is made from all of them. Training runs in float32 on
one thread. Where several seeds were run, ranges are over seeds, and two arms are called apart only
where their ranges do not overlap; of a single seed the numbers are compared as they are.
"""

from experiments import main

EXPERIMENTS = {
    "decay": "sparsity_decay",
    "retraining": "sparsity_retraining",
    "longer": "sparsity_longer",
    "squarehead": "sparsity_squarehead",
    "enough": "sparsity_enough",
    "solver": "sparsity_solver",
    "memory": "sparsity_memory",
}

if __name__ == "__main__":
    main("sparsity", "Sparsity", __doc__, EXPERIMENTS)
