"""The key-value cache in 8 bits: what it costs and what it saves.

Weights stay float. 128 calibration rows of 128 tokens fix the scales (quantize.cache), the loss is
that of held-out rows. *A scale a head* takes the largest of a head's channels for all of them.
Times are CPU milliseconds of a token behind 480 others in ONNX Runtime, one thread, the median of
15 rounds of 20 steps in turns on a machine with other work; ratios are formed within rounds.
*Plain* is the float32 cache with attention in nodes of the ONNX standard (`attention: plain`). Two
minutes a model.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import lab
import numpy as np
from cells import table
from sweep import NOT_RUN

from compressor.engines.onnx_session import Session
from compressor.export import onnx
from compressor.model.kv_cache import attach, attentions, bytes_per_token, scales_of
from compressor.quantize import cache

TITLE = "The cache in 8 bits"
MODELS = (lab.STORIES, "novels-llama")
ARMS = {"float32": None, "int8": "channel", "int8, a scale a head": "head"}
TIMED = ("float32", "int8", "plain")
PAST, ROUNDS, STEPS = 480, 15, 20


def rounding(name, scales):
    """The checkpoint with its cache rounded, or as it is."""
    model = lab.original(name)
    if scales is None:
        return model
    with lab.workbench(name, 0, calibration="train") as work:
        cache.run(model, cache.Options(samples=128, length=lab.LENGTH), work)
    if scales == "head":
        pairs = [scales_of(module) for module in attentions(model)]
        wide = [[s.amax(-1, keepdim=True).expand_as(s).clone() for s in pair] for pair in pairs]
        attach(model, wide)
    return model


def quality(name, arm):
    model = rounding(name, ARMS[arm])
    taken = bytes_per_token(model.sizes)["float32" if ARMS[arm] is None else "int8"]
    return {"heldout": lab.loss(model, lab.rows(name, "heldout")), "bytes_per_token": taken}


def times(name):
    """{arm: {ms, ratio to float32: median and ends}} of steps in turns."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for arm in TIMED:
            place = Path(folder, arm)
            place.mkdir()
            attention = "plain" if arm == "plain" else "fused"
            onnx.run(rounding(name, ARMS.get(arm)), onnx.Options(attention=attention), place)
            sessions[arm] = Session(place / "model.onnx", threads=1)
        feeds = {arm: _feeds(session) for arm, session in sessions.items()}
        found = {arm: [] for arm in sessions}
        for _ in range(ROUNDS):
            for arm, session in sessions.items():
                start = time.process_time()
                for _ in range(STEPS):
                    session.run(feeds[arm])
                found[arm].append((time.process_time() - start) / STEPS * 1000)
    timed = {}
    for arm, values in found.items():
        ratios = [own / base for own, base in zip(values, found["float32"], strict=True)]
        three = (statistics.median(ratios), min(ratios), max(ratios))
        timed[arm] = {"ms": statistics.median(values), "ratio": three}
    return {"timed": timed}


def _feeds(session):
    """One token behind PAST others, whose keys and values are noise."""
    draw, found = np.random.default_rng(0), {}
    for name, shape in session.inputs.items():
        if name.startswith("past"):
            values = draw.normal(size=(1, shape[1], PAST, shape[3]))
            kind = session.types[name]
            found[name] = (values * 40 if kind == np.int8 else values).astype(kind)
    found["input_ids"] = np.array([[5]])
    found["attention_mask"] = np.ones((1, PAST + 1), np.int64)
    found["position_ids"] = np.array([[PAST]])
    return {name: session.value(found[name]) for name in session.inputs}


def run(cells, model, seeds):
    """Quality of every arm, then times."""
    for arm in ARMS:
        cells.run(f"cache {model} {arm}", partial(quality, model, arm))
    cells.run(f"cache {model} times", partial(times, model))


def section(cells):
    """A row for every model and arm."""
    rows = []
    for model in MODELS:
        times = cells.found.get(f"cache {model} times", {}).get("timed", {})
        for arm in (*ARMS, "plain"):
            found = cells.found.get(f"cache {model} {arm}")
            row = [f"{found['heldout']:.4f}", str(found["bytes_per_token"])] if found else None
            timed = [""] * 2 if arm not in TIMED else [NOT_RUN] * 2
            if arm in times:
                ratio, low, high = times[arm]["ratio"]
                timed = [f"{times[arm]['ms']:.3f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
            quality = ["", ""] if arm == "plain" else row or [NOT_RUN] * 2
            rows.append([f"{model}, {arm}", *quality, *timed])
    return [table(["cache", "nats per token", "bytes a token", "ms", "of float32's"], rows)]
