"""Quantized distillation and differentiable quantization against rounding, at 2 to 8 bits.

The paper (arXiv 1802.05668) compares post-training quantization without buckets (PM, one scale for
a tensor's row here), with buckets, quantized distillation and differentiable quantization, with a
student as large as its teacher and smaller ones. Everything is quantized, embeddings and head
included; *ends float* leaves these two alone, as the paper does outside CIFAR-10. *Group* is the
grid along inputs that exports (32 inputs a scale on stories260K, 64 on novels-llama, with zero
points); *flat* is the paper's preset, 256 consecutive weights, four rows of stories260K. *PM*
rounds with the same buckets. *DQ* starts at quantiles, as in the paper.

What trains takes the same batches, 500 steps of 8 rows of 128 tokens, the loss 0.7 KL + 0.3 cross
entropy against the float original, and a grid of three rates, which grows where its best is at an
end; the best on validation text with seed 0 is run with the other seeds. *Float, trained* is the
fair bound: the float model with the same loss and batches. The half-size student is
prune.minitron's (parameters: 0.5), recovered in float by the same loss: its own bound. *Recovered*
is the share of what the best rounding without training loses against the float original, of
perplexity and of nats: GPTQ, clipped, of the same layers, or PM in the same flat buckets. 1 to 2
minutes a cell that trains.
"""

import math
from functools import cache, partial

import lab
from cells import table
from sweep import NOT_RUN, best_rate, mean, outcomes, shown, sweep

from compressor.distill import kd
from compressor.distill.runner import run as train
from compressor.model.manifest import quantized
from compressor.numerics.buckets import even_points
from compressor.numerics.projected_codebook import Codebook
from compressor.prune import minitron
from compressor.quantize import differentiable, distilled, gptq, rtn
from compressor.quantize.sizes import sizes
from compressor.quantize.trained import place_all, trained_targets
from compressor.training.options import Train

TITLE = "Training the quantized model"
MODELS = {lab.STORIES: (32, 500), "novels-llama": (64, 100)}  # inputs of a group, steps
BITS = (2, 4, 3, 8)
RATES = (3e-4, 1e-3, 3e-3)
POINT_RATES = (1e-3, 1e-2, 1e-1)  # of points, in gaps between them
CE = 0.3
FLAT = {"bucket": "flat", "group": 256}
ENDS = ", ends float"
FLOAT_ENDS = {"embeddings": False, "head": False}
ROUNDED = ("PM, no buckets", "PM, flat", "PM, group", "GPTQ, clipped", f"GPTQ, clipped{ENDS}")
LEARNED = "QD, learned steps"
TRAINED = ("QD, group", LEARNED, f"{LEARNED}{ENDS}", "QD, flat", "DQ, flat", "DQ, group")
STUDENTS = ("same size", "half size")


def options(model, lr, steps=None):
    return Train(
        **{"steps": steps or MODELS[model][1], "batch": lab.BATCH, "length": lab.LENGTH, "lr": lr},
        **{"precision": "float32", "snapshot_seconds": 1e6},
    )


@cache
def half(model, lr):
    """The half-size student after its recovery in float: its state and config."""
    student = lab.original(model)
    with lab.workbench(model, 0, calibration="train") as work:
        pruned = minitron.Options(parameters=0.5, samples=lab.CALIBRATION, length=lab.LENGTH)
        minitron.run(student, pruned, work)
        recover(student, model, lr, work)
    return student


def recover(student, model, lr, work, steps=None):
    work.teacher.module.requires_grad_(False)
    chosen = kd.Options(train=options(model, lr, steps), temperature=1.0, ce=CE)
    train(student, kd.objective(chosen, student, work.teacher), chosen, work)


def fitting(model):
    """Groups, and what to do with layers they do not divide."""
    return {"group": MODELS[model][0], "uneven": "channel", "symmetric": False}


def rounded(student, model, arm, bits, work):
    """Quantize without training."""
    group = fitting(model) | {"bits": bits}
    if arm == "PM, flat":
        chosen = distilled.Options(bits=bits, **FLAT)
        points = even_points(bits, "linear")
        found = trained_targets(student, chosen)
        place_all(student, [(t, Codebook(chosen.buckets(t), points)) for t in found])
    elif arm.startswith("GPTQ"):
        data = {"samples": 128, "length": lab.LENGTH}
        ends = FLOAT_ENDS if ENDS in arm else {}
        gptq.run(student, gptq.Options(**group, **data, **ends, clip="mse"), work)
    else:
        whole = {"group": None} if arm == "PM, no buckets" else {}
        rtn.run(student, rtn.Options(**group | whole), work)


def trainer(model, arm, bits, train):
    """(method, its options) of an arm that trains."""
    group, common = fitting(model), {"bits": bits, "ce": CE, "train": train}
    linear = {k: v for k, v in group.items() if k != "symmetric"}
    method, more = {
        "QD, group": (distilled, group),
        LEARNED: (distilled, group | {"steps": "learned"}),
        f"{LEARNED}{ENDS}": (distilled, group | {"steps": "learned"} | FLOAT_ENDS),
        "QD, flat": (distilled, FLAT),
        "DQ, flat": (differentiable, FLAT),
        "DQ, group": (differentiable, linear),
    }[arm]
    return method, method.Options(**common, **more)


def cell(model, size, arm, bits, seed, lr=None, steps=None):
    """Losses after an arm."""
    student = lab.original(model) if size == "same size" else half(model, 1e-3)
    if size == "half size":
        student = lab.copy_of(student)
    with lab.workbench(model, seed, calibration="train") as work:
        work.teacher.module.requires_grad_(False)
        if arm == "float, trained":
            recover(student, model, lr, work, steps)
        elif arm in ROUNDED:
            rounded(student, model, arm, bits, work)
        elif arm != "float":
            method, chosen = trainer(model, arm, bits, options(model, lr, steps))
            method.run(student, chosen, work)
    splits = {s: lab.loss(student, lab.rows(model, s)) for s in ("validation", "heldout")}
    size = sizes(student) if quantized(student.formats) else None
    return splits | {"lr": lr, "size": size}


def prefix(model, size, arm, bits):
    return f"trained {model} {size} {arm}" + (f" {bits} bits" if bits else "")


def run(cells, model, seeds):
    """Float, then rounding, then what trains; two bits first."""
    for size in STUDENTS:
        name = prefix(model, size, "float", None)
        cells.run(name, partial(cell, model, size, "float", None, 0))
        if size == "same size":
            name = prefix(model, size, "float, trained", None)
            make = partial(cell, model, size, "float, trained", None)
            sweep(cells, name, make, seeds, RATES, grows=True)
        for bits in BITS:
            for arm in ROUNDED:
                for seed in seeds:
                    name = f"{prefix(model, size, arm, bits)} seed {seed}"
                    cells.run(name, partial(cell, model, size, arm, bits, seed))
            for arm in TRAINED if size == "same size" else TRAINED[:1]:
                make, rates = partial(cell, model, size, arm, bits), rates_of(arm)
                sweep(cells, prefix(model, size, arm, bits), make, seeds, rates, grows=True)


def rates_of(arm):
    return POINT_RATES if arm.startswith("DQ") else RATES


def section(cells):
    """A table for every model and student."""
    blocks = []
    for model in MODELS:
        for size in STUDENTS:
            blocks += [f"### {model}, {size}", _table(cells, model, size)]
    return blocks


def _values(cells, model, size, arm, bits):
    name = prefix(model, size, arm, bits)
    if arm == "float":
        return [cells.found[name]["heldout"]] if name in cells.found else []
    if arm in ROUNDED:
        found = [cells.found.get(f"{name} seed {seed}") for seed in range(10)]
        return [c["heldout"] for c in found if c]
    return outcomes(cells, name)


def _table(cells, model, size):
    base = _values(cells, model, size, "float", None)
    rows = []
    for arm in ("float", "float, trained")[: 2 if size == "same size" else 1]:
        rows.append(_row(cells, model, size, arm, None, base))
    for bits in sorted(BITS):
        for arm in (*ROUNDED, *(TRAINED if size == "same size" else TRAINED[:1])):
            rows.append(_row(cells, model, size, arm, bits, base))
    header = ["arm", "rate", "nats per token", "over seeds", "seeds", "perplexity", "to float"]
    return table([*header, "recovered %", "of nats %"], rows)


def _row(cells, model, size, arm, bits, base):
    values = _values(cells, model, size, arm, bits)
    trains = arm in TRAINED or arm == "float, trained"
    rate = best_rate(cells, prefix(model, size, arm, bits)) if trains else None
    label = f"{bits} bits, {arm}" if bits else arm
    if not values or not base:
        return [label, "", *shown(values), NOT_RUN, "", "", ""]
    ratio = math.exp(mean(values) - base[0])
    back = recovered(cells, model, size, arm, bits, mean(values)) if trains and bits else []
    back = [f"{share:.0f}" for share in back] or ["", ""]
    perplexity = f"{math.exp(mean(values)):.3f}"
    shown_rate = f"{rate:g}" if rate else ""
    return [label, shown_rate, *shown(values), perplexity, f"{100 * (ratio - 1):+.1f} %", *back]


def recovered(cells, model, size, arm, bits, loss):
    """Of perplexity and of nats: per cent of what rounding loses that `loss` has won back.

    Nothing where rounding was not run, or loses nothing.
    """
    base = _values(cells, model, size, "float", None)
    worst = _values(cells, model, size, _rounding(arm), bits)
    if not base or not worst or mean(worst) <= base[0]:
        return []
    ends = mean(worst), loss, base[0]
    return [_share(*map(math.exp, ends)), _share(*ends)]


def _rounding(arm):
    """The best rounding without training of the same layers in the same buckets."""
    if "flat" in arm:
        return "PM, flat"
    return f"GPTQ, clipped{ENDS}" if ENDS in arm else "GPTQ, clipped"


def _share(worst, own, best):
    """Per cent of the way from the worst to the best."""
    return 100 * (worst - own) / (worst - best)
