"""What was hoped for, and what the tables below say.

*No worse* is at most 0.003 above, in nats (0.3 % of perplexity) or in cosine, at every setting;
means over the seeds there are. *Recovered* is a share of the perplexity that GPTQ with clipped
grids loses. *Float* is the original; the float model trained on for as long, the fair bound, is
below. At equal bytes the better of the trained ways of either counts, and all ways of the loser
must have been run.
"""

import math

import quantization_bytes as equal
import quantization_cost as cost
import quantization_longer as longer
import quantization_ptq as ptq
import quantization_trained as trained
from cells import table
from sweep import mean, outcomes

TITLE = "Goals and questions"
SAME = "same size"
NOISE = 0.003


def section(cells):
    """One table of all goals."""
    rows = [*_beside(cells), *_recovered(cells), *_close(cells), *_half(cells), *_equal(cells)]
    return [table(["goal", "where", "found", "verdict"], rows)]


def _verdict(met):
    return "met" if met else "not met"


def _beside(cells):
    """Post-training quantization is no worse than llm-compressor's, setting by setting."""
    for model in ptq.MODELS:
        found = []
        for setting, _, _, peers in ptq.settings(model):
            for arm in peers:
                pair = [
                    ptq.values(cells, f"ptq {model} {setting} {whose}{arm}")
                    for whose in ("", "llm-compressor ")
                ]
                if all(pair):
                    found.append((mean(pair[0]) - mean(pair[1]), f"{setting}, {arm}"))
        if found:
            worst, name = max(found)
            lower = sum(apart <= 0 for apart, _ in found)
            said = f"better or equal in {lower} of {len(found)}; at worst {worst:+.4f} ({name})"
            yield ["no worse than llm-compressor", model, said, _verdict(worst <= NOISE)]


def _lengths(cells, model, bits):
    """(steps, nats) of quantized distillation with learned steps, seed 0 where it is longer."""
    steps = trained.MODELS[model][1]
    found = outcomes(cells, trained.prefix(model, SAME, trained.LEARNED, bits))
    if found:
        yield steps, mean(found)
    for times in longer.TIMES:
        cell = cells.found.get(longer.name(model, trained.LEARNED, bits, times))
        if cell:
            yield times * steps, cell["heldout"]


def _recovered(cells):
    for model in trained.MODELS:
        for steps, loss in _lengths(cells, model, 2):
            for share in trained.recovered(cells, model, SAME, trained.LEARNED, 2, loss)[:1]:
                where, met = f"{model}, {steps:,} steps", _verdict(share >= 90)
                yield ["2 bits recover 90 %", where, f"{share:.1f} %", met]


def _close(cells):
    for model in trained.MODELS:
        base = cells.found.get(trained.prefix(model, SAME, "float", None))
        for steps, loss in _lengths(cells, model, 4) if base else ():
            above = 100 * math.expm1(loss - base["heldout"])
            where = f"{model}, {steps:,} steps"
            yield ["4 bits within 0.5 % of float", where, f"{above:+.2f} %", _verdict(above <= 0.5)]


def _half(cells):
    for size in cost.LAYERS:
        for arm in cost.METHODS:
            pair = [cells.found.get(cost.name(size, arm, w)) for w in ("ours", "llm-compressor")]
            for key, label in (("cpu_seconds", "seconds"), ("whole_bytes", "memory")):
                values = [c.get(key) if c else None for c in pair]
                if None not in values:
                    ratio = values[0] / values[1]
                    goal = f"half of llm-compressor's {label}"
                    yield [goal, f"{size}, {arm}", f"{ratio:.2f}", _verdict(ratio <= 0.5)]


def _equal(cells):
    for model in trained.MODELS:
        for dense, sparse in (
            ("dense 3 bits", "50 % sparse, 4 bits"),
            ("dense 2 bits", "75 % sparse, 4 bits"),
        ):
            found = {arm: _ways(cells, model, arm) for arm in (dense, sparse)}
            if not all(found.values()):
                continue
            best = {arm: min(ways) for arm, ways in found.items()}
            loser = max(best, key=best.__getitem__)
            if len(found[loser]) == len(equal.WAYS):
                said = f"{best[sparse]:.3f} and {best[dense]:.3f} nats"
                won = "no" if loser == sparse else "yes"
                yield [f"do {sparse} beat {dense}?", model, said, won]


def _ways(cells, model, arm):
    """Mean nats of each trained way that was run."""
    names = [equal.prefix(model, arm, way) for way in equal.WAYS]
    return [mean(outcomes(cells, name)) for name in names if outcomes(cells, name)]
