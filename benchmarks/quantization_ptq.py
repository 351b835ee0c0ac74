"""Post-training quantization beside llm-compressor: the same bits, groups, rows and layers.

128 calibration rows of 128 tokens; the seed chooses them. Head and embeddings stay float, and
layers that a group does not divide get one scale per output channel. llm-compressor runs in an
environment of its own (benchmarks/peer_llm_compressor.py has the commands) and scores the same
held-out rows with its own quantized model. Decoders: nats per token. all-MiniLM-L6-v2: one minus
the mean cosine of sentence embeddings to the original's, on 512 sentences of the dev part of STS-B.
Seconds to a minute a cell. ONNX Runtime's own quantizers (benchmarks/peer_onnxruntime.py) need no
data, so they have one cell each: rounding to nearest, HQQ, and dynamic int8. It has no 3 bits.

*GPTQ* orders columns by activation in both programs, with the grid of the extreme values; *clipped*
arms search the grid as well. ONNX Runtime's symmetric grid spends its odd level on the side of the
largest weight, ours lies in the middle. *AWQ* cannot fold scales into the norms of a post-norm
encoder. *W8A8* rounds activations to 8 bits per token when they come.
"""

from functools import cache, partial

import lab
import minitron_encoder as encoder
import peer_onnxruntime as runtime
import torch
from cells import DATA, table
from peers import PEER, ask, together
from sweep import NOT_RUN, mean, shown
from torch.nn.functional import cosine_similarity

from compressor.model.model import pool
from compressor.model.sources import resolve
from compressor.quantize import awq, gptq, rtn, smoothquant

TITLE = "Post-training quantization beside llm-compressor"
ENCODER = "all-MiniLM-L6-v2"
MODELS = {lab.STORIES: (32,), "novels-llama": (128, 64), ENCODER: (128, 64)}  # groups
SAMPLES, LENGTH = 128, 128
SENTENCES = 512  # that the encoder is scored on
SCHEMES = {
    "W4": {"bits": 4, "symmetric": True},
    "W4 with zero points": {"bits": 4, "symmetric": False},
    "W3 with zero points": {"bits": 3, "symmetric": False},
    "W2 with zero points": {"bits": 2, "symmetric": False},
}
W8A8 = {"bits": 8, "symmetric": True, "group": None}
FLOAT = {"embeddings": False, "head": False, "uneven": "channel"}
DATA_OPTIONS = {"samples": SAMPLES, "length": LENGTH}
OURS = {
    "RTN": (rtn, {}),
    "RTN, clipped": (rtn, {"clip": "mse"}),
    "GPTQ": (gptq, {"clip": "none"} | DATA_OPTIONS),
    "GPTQ, clipped": (gptq, {"clip": "mse"} | DATA_OPTIONS),
    "AWQ": (awq, DATA_OPTIONS),
}
OURS_W8A8 = {
    "W8A8 RTN": (rtn, {"activation": "token"}),
    "W8A8 SmoothQuant": (smoothquant, {"activation": "token"} | DATA_OPTIONS),
}
THEIRS = {"RTN": "rtn", "GPTQ": "gptq", "AWQ": "awq"}
THEIRS_W8A8 = {"W8A8 RTN": "rtn", "W8A8 SmoothQuant": "smoothquant"}
RUNTIME = {"RTN": "RTN", "HQQ": "HQQ", "W8A8 RTN": "dynamic"}


def settings(model):
    """(name, options, our arms, arms of the peer) of every setting of a model."""
    for group in MODELS[model]:
        for scheme, options in SCHEMES.items():
            yield f"{scheme}, group {group}", options | {"group": group}, OURS, THEIRS
    yield "W8A8", W8A8, OURS_W8A8, THEIRS_W8A8


def workbench(model, seed):
    if model == ENCODER:
        return encoder.workbench(seed)
    return lab.workbench(model, seed, calibration="train")


def original(model):
    return encoder.original() if model == ENCODER else lab.original(model)


@cache
def heldout(model):
    """What a quantized model is scored on."""
    if model != ENCODER:
        return lab.rows(model, "heldout")
    every = sorted({s for row in encoder.pairs("dev") for s in row[:2]})
    sentences = every[:: len(every) // SENTENCES][:SENTENCES]
    made = encoder.original().processor(
        sentences, padding="max_length", truncation=True, max_length=64, return_tensors="pt"
    )
    return [{k: v[i : i + 8] for k, v in made.items()} for i in range(0, len(sentences), 8)]


@torch.no_grad()
def embeddings(model):
    states = [
        pool(model.module(**b).last_hidden_state, b["attention_mask"], model.pooling)
        for b in heldout(ENCODER)
    ]
    return torch.cat(states)


@cache
def wanted():
    return embeddings(original(ENCODER))


def away(vectors):
    """One minus the mean cosine to the original's embeddings."""
    return 1 - float(cosine_similarity(vectors, wanted()).mean())


def score(name, model):
    return away(embeddings(model)) if name == ENCODER else lab.loss(model, heldout(name))


def ours(model, options, arm, seed):
    """Our own quantizer on a fresh model."""
    method, more = {**OURS, **OURS_W8A8}[arm]
    quantized = original(model)
    with workbench(model, seed) as work:
        method.run(quantized, method.Options(**FLOAT | options | more), work)
    return {"heldout": score(model, quantized)}


def theirs(model, options, method, seed):
    """llm-compressor on the same rows."""
    with workbench(model, seed) as work:
        batches = work.batches("calibration", SAMPLES // 8, batch=8, length=LENGTH)
        calibration = together([batches[i] for i in range(len(batches))])
    layers = [n for n, m in original(model).module.named_modules() if hasattr(m, "in_features")]
    group = options["group"]
    linears = {n: original(model).module.get_submodule(n) for n in layers if n != "lm_head"}
    uneven = [n for n, m in linears.items() if group and m.in_features % group]
    path = resolve(encoder.PACKAGE).path if model == ENCODER else None
    path = path or DATA / "checkpoints" / model.removesuffix(lab.WHOLE)
    job = {
        **{"model": str(path), "task": "encoder" if model == ENCODER else "causal-lm"},
        **options,
        **{"method": method, "activation": "token" if options["bits"] == 8 else None},
        **{"ignore": ["lm_head"], "uneven": uneven},
    }
    facts, scores = ask(job, calibration, together(heldout(model)))
    value = away(scores) if model == ENCODER else float(scores)
    return {"heldout": value, "cpu_seconds": facts["cpu_seconds"]}


def runtimes(setting, options):
    """Arms that ONNX Runtime has at a setting."""
    if setting == "W8A8":
        return ["W8A8 RTN"]
    if options["bits"] == 3:
        return []
    return ["RTN", "HQQ"] if options["bits"] == 4 and not options["symmetric"] else ["RTN"]


def theirs_runtime(model, options, arm):
    """A quantizer of ONNX Runtime."""
    found = runtime.outputs(original, model, RUNTIME[arm], options, heldout(model))
    if model == ENCODER:
        return {"heldout": away(runtime.embeddings(found))}
    return {"heldout": runtime.loss(found, heldout(model))}


def run(cells, model, seeds):
    """Every setting, ours and the peers'."""
    cells.run(f"ptq {model} float", lambda: {"heldout": score(model, original(model))})
    for setting, options, *_ in settings(model):
        for arm in runtimes(setting, options):
            name = f"ptq {model} {setting} ONNX Runtime {arm}"
            cells.run(name, partial(theirs_runtime, model, options, arm))
    for seed in seeds:
        for setting, options, mine, peers in settings(model):
            for arm in mine:
                name = f"ptq {model} {setting} {arm} seed {seed}"
                cells.run(name, partial(ours, model, options, arm, seed))
            for arm, method in peers.items() if PEER else ():
                name = f"ptq {model} {setting} llm-compressor {arm} seed {seed}"
                cells.run(name, partial(theirs, model, options, method, seed))


def section(cells):
    """A table for every model: our arms, and the peer's beside them."""
    blocks = []
    for model in MODELS:
        base = cells.found.get(f"ptq {model} float")
        shown_base = f"{base['heldout']:.4f}" if base else NOT_RUN
        unit = "one minus cosine" if model == ENCODER else "nats per token"
        blocks += [f"### {model}", f"Float: {shown_base}. Cells are {unit}."]
        blocks.append(_table(cells, model))
    return blocks


def _table(cells, model):
    rows = []
    for setting, options, mine, peers in settings(model):
        known = runtimes(setting, options)
        for arm in [*mine, *(arm for arm in known if arm not in mine)]:
            own = values(cells, f"ptq {model} {setting} {arm}")
            other = values(cells, f"ptq {model} {setting} llm-compressor {arm}")
            apart = f"{mean(own) - mean(other):+.4f}" if own and other else ""
            row = [*shown(own, 4), *shown(other, 4)[:2], apart]
            if arm not in mine:
                row[:3] = ["", "", ""]
            if arm not in peers:
                row[3:5] = ["", ""]
            third = cells.found.get(f"ptq {model} {setting} ONNX Runtime {arm}")
            said = f"{third['heldout']:.4f}" if third else NOT_RUN
            rows.append([f"{setting}, {arm}", *row, said if arm in known else ""])
    header = ["arm", "ours", "over seeds", "seeds", "llm-compressor", "over seeds", "ours minus"]
    return table([*header, "ONNX Runtime"], rows)


def values(cells, name):
    """Held-out scores of an arm, one for each seed that was run."""
    found = [cells.found.get(f"{name} seed {seed}") for seed in range(10)]
    return [cell["heldout"] for cell in found if cell]
