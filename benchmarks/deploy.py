"""Deployment: every model in every format and engine, and what a user might pick instead.

    python benchmarks/deploy.py EXPERIMENT [--model MODEL]
    python benchmarks/deploy.py page

MODEL is the experiment's first unless given. Every experiment is a file of its own,
benchmarks/deploy_*.py. Needs the extras genai, openvino and llama-cpp, and for one peer `pip
install
nncf`. Cells are appended to docs/results/deploy.jsonl and skipped where they are there;
docs/results/deploy.md is made from all of them. One thread.
"""

from experiments import main

EXPERIMENTS = {"peers": "deploy_peers", "matrix": "deploy_matrix", "times": "deploy_times"}

if __name__ == "__main__":
    main("deploy", "Deployment", __doc__, EXPERIMENTS)
