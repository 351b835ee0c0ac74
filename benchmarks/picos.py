"""Pico models of every family, from the tests, and random calibration batches for them."""

import sys
import tempfile
from pathlib import Path

from cells import ROOT

sys.path.insert(0, str(ROOT / "tests"))

import torch

from compressor.screen import Silent
from compressor.training.workbench import Workbench
from families import CONFIGS, pico, random_inputs

__all__ = ("CONFIGS", "pico", "random_inputs", "workbench")


def workbench(model):
    """Random calibration batches of what the model reads."""
    return Workbench(
        seed=0,
        device=torch.device("cpu"),
        scratch=Path(tempfile.mkdtemp()),
        _screen=Silent(),
        _log=lambda line: None,
        _batches=lambda split, n, **shape: [random_inputs(model, seed=i) for i in range(2)],
        _teacher=lambda: model,
        _reference=lambda: None,
    )
