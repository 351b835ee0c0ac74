"""The column solver of SparseGPT: seconds of a layer, its share of a bound, and its error.

One square layer of random weights and correlated inputs, one thread, CPU seconds (the machine has
other users), the best of three. The bound of each step is its floating-point operations at the rate
of a 1024-cube product measured between the steps:

    Hessian      T I^2 for T tokens: one triangle (the panels compute 1 + 512 / I times as much)
    factor       2 I^3 / 3: a Cholesky decomposition and a triangular inverse, a third each
    column loop  O I^2: column i is taken to the I - i columns after it, 2 O operations for each

Errors are relative square errors of the output, against the paper's algorithm in float64 that makes
the inverse of what is left anew for every column. Seconds to 10 minutes a size.
"""

import sys
import time
from functools import partial

import torch
from cells import ROOT, table
from sweep import NOT_RUN

from compressor.model.moments import Moments
from compressor.numerics.masks import group_of
from compressor.numerics.solver import (
    factorize,
    in_blocks,
    in_groups,
    output_energy,
    solve,
)

sys.path.append(str(ROOT / "tests"))
from sparsegpt_reference import by_the_book

TITLE = "The solver"
SIZES = (1024, 2048, 4096)
TOKENS, ROUNDS, ROWS = 4096, 3, 512
ERRORS = ((96, "unstructured", 0.5), (256, "unstructured", 0.5), (256, "unstructured", 0.7))
ERRORS += ((256, "2:4", 0.5), (256, "8:16", 0.5))


def layer(size, tokens=TOKENS, seed=0):
    """A weight [I, I] and inputs [T, I] that are correlated and of uneven sizes."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=draw) / size**0.5 + torch.eye(size)
    x = torch.randn(tokens, size, generator=draw) @ mix
    return torch.randn(size, size, generator=draw), x * torch.rand(size, generator=draw).add(0.2)


def best(act):
    """CPU seconds of the fastest round, and what the last one gave."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        found = act()
        times.append(time.process_time() - start)
    return min(times), found


def hessian(x):
    """Second moments as the walk accumulates them."""
    linear = torch.nn.Linear(x.shape[1], 1)
    moments = Moments({"layer": linear}, {"layer": "none"}, whole=True)
    for part in x.split(ROWS):
        with moments.watching({}):
            linear(part)
    return moments.pop("layer")


def product_rate():
    """Floating-point operations a CPU second of a 1024-cube product now."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / best(lambda: a @ a)[0]


def speed_cell(size):
    """Seconds of each step and the rate of a large product at that time."""
    torch.set_num_threads(1)
    w, x = layer(size)
    rates = [product_rate()]
    found = {}
    found["hessian"], h = best(partial(hessian, x))
    rates.append(product_rate())
    found["factor"], factor = best(partial(factorize, h))
    rates.append(product_rate())
    found["unstructured"], new = best(partial(solve, w, factor, in_blocks(0.5)))
    rates.append(product_rate())
    found["2:4"], _ = best(partial(solve, w, factor, in_groups(2, 4)))
    rates.append(product_rate())
    error = output_energy(w - new, h) / output_energy(w, h)
    return {"seconds": found, "rate": max(rates), "error": error}


def error_cell(size, pattern, sparsity):
    """Errors of ours and of the reference on one layer."""
    torch.set_num_threads(1)
    w, x = layer(size, 4 * size)
    h = 2 * x.T @ x / len(x)
    group = group_of(pattern)
    pick = in_blocks(sparsity) if group is None else in_groups(*group)
    ours, wanted = solve(w, factorize(h), pick), by_the_book(w, h, pattern, sparsity)
    h, w = h.double(), w.double()
    energy = output_energy(w, h)
    return {
        "ours": output_energy(w - ours.double(), h) / energy,
        "reference": output_energy(w - wanted, h) / energy,
        "same_mask": float(((ours != 0) == (wanted != 0)).float().mean()),
    }


def run(cells, model, seeds):
    """All sizes; the model and the seeds of the other experiments do not matter here."""
    for given in ERRORS:
        cells.run(_name(*given), partial(error_cell, *given))
    for size in SIZES:
        cells.run(f"solver {size}", partial(speed_cell, size))


def _name(size, pattern, sparsity):
    return f"solver error {size} {pattern} {sparsity:g}"


def section(cells):
    """Seconds and shares of the bound by size; errors beside those of the reference."""
    header = ["layer", "Hessian s", "of bound", "factor s", "of bound"]
    header += ["unstructured s", "of bound", "2:4 s", "of bound"]
    errors = ["layer", "pattern", "sparsity", "error", "reference", "difference", "same mask"]
    said = f"Hessian of {TOKENS:,} tokens; a calibration of 128 x 512 has {65536 // TOKENS} times."
    return [
        table(header, [[f"{size}²", *_speeds(cells, size)] for size in SIZES]),
        said,
        table(errors, [_errors(cells, *given) for given in ERRORS]),
    ]


def _speeds(cells, size):
    cell = cells.found.get(f"solver {size}")
    if cell is None:
        return [NOT_RUN] * 8
    work = {"hessian": TOKENS * size**2, "factor": 2 * size**3 / 3}
    row = []
    for step, seconds in cell["seconds"].items():
        bound = work.get(step, size**3) / cell["rate"]
        row += [f"{seconds:.3f}", f"{bound / seconds:.0%}"]
    return row


def _errors(cells, size, pattern, sparsity):
    cell, start = cells.found.get(_name(size, pattern, sparsity)), [f"{size}²", pattern]
    if cell is None:
        return [*start, f"{sparsity:g}", *[NOT_RUN] * 4]
    gap = cell["ours"] / cell["reference"] - 1
    numbers = [f"{cell['ours']:.5f}", f"{cell['reference']:.5f}", f"{gap:+.1e}"]
    return [*start, f"{sparsity:g}", *numbers, f"{cell['same_mask']:.2%}"]
