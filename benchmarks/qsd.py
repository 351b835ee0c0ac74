"""QSD: a vision transformer as a quantized spike-driven one, and what each of its parts is worth.

    python benchmarks/qsd.py arms [--model MNIST|"MNIST, longer"|digits] [--seeds 0 1 2 3 4]
    python benchmarks/qsd.py files [--model MNIST|"ViT-Tiny's shape"|"ViT-Small's shape"]
    python benchmarks/qsd.py page

Seeds are folds: of five, each holds out another fifth of the images. Cells are appended to
docs/results/qsd.jsonl and skipped where they are there; docs/results/qsd.md is made from all of
them, most important cells first. One thread. The small ViT that is the teacher is kept in the
temporary folder.
"""

from experiments import main

EXPERIMENTS = {"arms": "qsd_arms", "files": "qsd_files"}

if __name__ == "__main__":
    main("qsd", "Quantized spike-driven transformers", __doc__, EXPERIMENTS)
