"""Learning rates, seeds and what a page says about them.

An arm tries every rate of the grid with seed 0; the best on validation text is then run with the
other seeds, and held-out losses are reported at that rate only. Where asked, a grid grows by a rate
of LADDER, twice at most, while its best rate is at its end.
"""

from functools import partial

RATES = (1e-3, 3e-3, 1e-2)
LADDER = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
NOT_RUN = "not run"


def key(arm, lr, seed):
    """The name of a cell."""
    return f"{arm} lr {lr:g} seed {seed}"


def sweep(cells, arm, make, seeds, rates=RATES, grows=False):
    """Run `make(seed, lr)` over the grid, then over the seeds at the best rate."""
    for lr in rates:
        cells.run(key(arm, lr, 0), partial(make, 0, lr))
    while grows and (lr := _beyond(tried(cells, arm), len(rates) + 2)):
        cells.run(key(arm, lr, 0), partial(make, 0, lr))
    best = best_rate(cells, arm)
    for seed in seeds:
        cells.run(key(arm, best, seed), partial(make, seed, best))


def _beyond(found, most):
    """The next rate of LADDER behind the end of a grid where its best is; None where it is not."""
    best = min(found, key=lambda lr: found[lr]["validation"])
    step = 1 if best == max(found) else -1 if best == min(found) else 0
    place = LADDER.index(best) + step
    return LADDER[place] if step and len(found) < most and 0 <= place < len(LADDER) else None


def tried(cells, arm):
    """{rate: cell with seed 0} of all rates that were run, ascending."""
    found = {c["lr"]: c for name, c in cells.found.items() if _is_trial(name, arm)}
    return dict(sorted(found.items()))


def _is_trial(name, arm):
    return str(name).startswith(f"{arm} lr ") and str(name).endswith(" seed 0")


def best_rate(cells, arm):
    """The rate of the lowest validation loss with seed 0; None while less than a grid was run."""
    found = tried(cells, arm)
    if len(found) < len(RATES):
        return None
    return min(found, key=lambda lr: found[lr]["validation"])


def edges(grids):
    """A remark on arms whose best rate ends their grid, {arm: (best rate, all that were run)}."""
    found = []
    for end, of in (("lowest", min), ("highest", max)):
        arms = [arm for arm, (best, rates) in grids.items() if best and best == of(rates)]
        if arms:
            found.append(f"Best at the {end} rate that was run: {'; '.join(arms)}.")
    return [" ".join(found)] if found else []


def outcomes(cells, arm, seeds=range(10), what="heldout"):
    """Values of an arm at its best rate, one for each seed that was run."""
    best = best_rate(cells, arm)
    found = [cells.found.get(key(arm, best, seed)) for seed in seeds] if best else []
    return [cell[what] for cell in found if cell]


def mean(values):
    """Arithmetic mean."""
    return sum(values) / len(values)


def shown(values, digits=3):
    """`mean` and `lowest to highest` as two columns, then how many."""
    if not values:
        return [NOT_RUN, NOT_RUN, "0"]
    ends = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
    return [f"{mean(values):.{digits}f}", ends, str(len(values))]


def against(first, second):
    """Whether values over seeds are `below`, `above` or `not apart from` others."""
    if max(first) < min(second):
        return "below"
    return "above" if min(first) > max(second) else "not apart from"
