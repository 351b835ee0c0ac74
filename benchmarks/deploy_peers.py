"""Beside what a user would pick instead: the same model, size, quality and speed.

Ours: 8 bits rounded to nearest; 4 bits by GPTQ with clipped grids, symmetric or with zero points; 4
or 8 bits layer by layer, 5.25 on average with scales. Groups of 32 (also of 64 and 128), embeddings
and head included, or these *tables* in 8 bits. *W8A8* rounds activations too, per tensor when they
come or, by SmoothQuant, to ranges of calibration: 128 rows of 128 tokens. One checkpoint each,
exported to every engine. The others are made by benchmarks/deploy_made.py.

Decoders: perplexity on 64 held-out windows of 128 tokens, KL from the original in nats, ms a token
of a greedy text behind a prompt of 128. all-MiniLM-L6-v2: one minus the mean cosine of sentence
embeddings to the original's on held-out sentences, ms a forward of one row of 128 tokens. All in
the engine that serves the file; one thread, all files of a model in one interleaved run of five
rounds. Ratios of times are formed within a round: their median, and in brackets the range of the
rounds. Half a minute a cell on a free core.

Under each table, for every file of another program: the smallest and the fastest of ours that are
as good, within 0.2 per cent of perplexity or 0.0005 of cosine, in any engine and in the same one,
and the fastest that is as small and not slower in every round. Above 1 we lose. Why we do where we
do: a weight of 8 bits in groups of 32 takes 9 bits in ONNX, whose scales are float32, and 8.5 in
GGUF; quantize_dynamic and nncf int8 have one scale a tensor or a row. *W8A8, dynamic* is as fast as
quantize_dynamic with a fraction of its error, and 2 to 6 per cent larger, for it has a scale for
every 128 inputs of a table and every output of a layer. Q4_K_M keeps the table of embedding and
head in 6 bits and scales in 6; our 4 bits are 4 everywhere. Of stories260K, whose MLP 32 does not
divide, it leaves most tensors at 5 or 8 bits, and at 4 bits so small a model loses too much. The
builder of genai has one product for queries, keys and values, turns positions inside attention and
adds residuals inside norms: of novels-llama a token runs 69 nodes, in our file 152. At a width of
256 small nodes take as long as products; a wider model has no more of them.
"""

import dataclasses
from contextlib import closing
from functools import partial

import numpy as np
import quantization_ptq as ptq
from cells import table
from deploy_made import builder, dynamic, llama, nncf
from deploy_matrix import NAMES, REAL, artifact, exported, kept, model_of, save, source_of
from deploy_speed import FIRST, shown, speed_key, speed_of, timed
from sweep import NOT_RUN

from compressor.engines import open_engine
from compressor.errors import CompressError, first_line
from compressor.measure import fidelity, perplexity
from compressor.model.sources import model_files
from compressor.quantize import gptq, rtn, smoothquant
from compressor.run.candidates import Candidate

TITLE = "Beside what a user would pick instead"
MODELS = tuple(REAL)
ROWS = 64
MEASURES = {"perplexity": perplexity, "fidelity": fidelity}
SAME, SAME_COSINE = 0.002, 0.0005  # of perplexity, relative, and of cosine: no difference
_GPTQ = {"bits": 4, "group": 32, "clip": "mse"} | ptq.DATA_OPTIONS
OURS = {
    "int8": (rtn, {"bits": 8, "group": 32}),
    "int4": (gptq, _GPTQ),
    "int4 and int8": (gptq, _GPTQ | {"mixed": {"average_bits": 5.25, "choices": (4, 8)}}),
    "int8, group 128": (rtn, {"bits": 8, "group": 128}),
    "int4, group 64": (gptq, _GPTQ | {"group": 64}),
    "int4, zero points": (gptq, _GPTQ | {"symmetric": False}),
    "int4, tables int8": (gptq, _GPTQ | {"table_bits": 8}),
    "int4, tables int8, group 128": (gptq, _GPTQ | {"table_bits": 8, "group": 128}),
    "W8A8, dynamic": (rtn, {"bits": 8, "group": None, "activation": "dynamic"}),
    "W8A8, static": (smoothquant, {"activation": "static"} | ptq.DATA_OPTIONS),
}
ENGINES = ("onnxruntime", "onnxruntime-genai", "openvino", "llama.cpp")
LATER = ("int8, group 128", "int4, group 64", "int4, zero points", "int4 and int8", "Q6_K")
LATER += ("int4, tables int8",)
PEERS = {  # what is made: (engine, maker)
    "quantize_dynamic int8": ("onnxruntime", dynamic),
    "genai builder int4": ("onnxruntime-genai", partial(builder, precision="int4")),
    "Q8_0": ("llama.cpp", partial(llama, kind="Q8_0")),
    "Q6_K": ("llama.cpp", partial(llama, kind="Q6_K")),
    "Q4_K_M": ("llama.cpp", partial(llama, kind="Q4_K_M")),
    "nncf int8": ("openvino", partial(nncf, mode="INT8_ASYM")),
    "nncf int4, group 128": ("openvino", partial(nncf, mode="INT4_ASYM", group_size=128)),
    "nncf int4, group 32": ("openvino", partial(nncf, mode="INT4_ASYM", group_size=32)),
}


def arms(model):
    """{name: whether it is ours} of everything compared, ours first."""
    engines = [e for e in ENGINES if model != ptq.ENCODER or e != "onnxruntime-genai"]
    mine = [
        f"{arm}, {NAMES.get(e, e)}"
        for arm in OURS
        for e in engines
        if OURS[arm][1].get("group") == 32 or e != "llama.cpp"  # which has blocks of 32 inputs
    ]
    others = [
        f"{arm}, {NAMES.get(e, e)}"
        for arm, (e, _) in PEERS.items()
        if e in engines and not (model == ptq.ENCODER and arm == "nncf int4, group 32")
    ]
    floats = [FIRST, "float16, llama.cpp"]
    return dict.fromkeys([*floats, *mine], True) | dict.fromkeys(others, False)


def quantized(model, arm, folder):
    """A checkpoint of ours."""
    loaded, parent = model_of(model)
    method, options = OURS[arm]
    with ptq.workbench(REAL[model], 0) as work:
        method.run(loaded, method.Options(**options, uneven="channel"), work)
    save(loaded, folder, parent, model)


def other(model, arm, folder):
    """A file of another program, whose refusal is what its row says."""
    try:
        PEERS[arm][1](model, folder)
    except (CompressError, ImportError, OSError, MemoryError):  # not what it says of the model
        raise
    except Exception as error:
        raise CompressError(first_line(error), "choose another form") from error


def candidate(model, name):
    """What is measured under a name; made where it is not there yet."""
    if name == FIRST:
        return Candidate(name, artifact(model, "onnx float32"))
    if name.startswith("float16"):
        return Candidate(name, artifact(model, "gguf f16"))
    arm, runs_in = name.rsplit(", ", 1)
    engine = {NAMES.get(e, e): e for e in ENGINES}[runs_in]
    if arm in PEERS:
        made = kept(f"peers {model} {arm}", partial(other, model, arm)) / "model"
    else:
        source = kept(f"peers {model} {arm}", partial(quantized, model, arm))
        graph = "onnx" if model == ptq.ENCODER else "genai"  # of which three engines read one file
        to = "gguf" if engine == "llama.cpp" else graph
        made = exported(f"peers {model} {arm} {to}", source, to)
    return Candidate(name, made, engine)


def quality(model, name):
    """Size and closeness of one file, in its engine; the original's outputs are kept."""
    measures = {"fidelity": fidelity} if model == ptq.ENCODER else MEASURES
    scores = {}
    try:
        found = candidate(model, name)
        with ptq.workbench(REAL[model], 0) as work, closing(found.open(1)) as engine:
            original = partial(open_engine, source_of(model, "float"), 1)
            kept_there = kept(f"peers {model} reference", lambda folder: None)
            work = dataclasses.replace(work, _reference=original, scratch=kept_there)
            for measure in measures.values():
                scores |= measure.run(engine, measure.Options(rows=ROWS), work)
    except CompressError as error:
        return {"refused": error.what}
    size = sum(file.stat().st_size for file in model_files(found.path))
    return {"ours": arms(model)[name], "megabytes": size / 1e6, **scores}


def key(model, name):
    return f"peers {model} {name}"


def run(cells, model, seeds):
    """Size and quality of every file, 8 bits and 4 bits of all before the rest."""
    for name in sorted(arms(model), key=lambda n: n.startswith(LATER)):
        cells.run(key(model, name), partial(quality, model, name))


def times(cells, model):
    """All files of a model in turns."""
    names = [n for n in arms(model) if "megabytes" in cells.found.get(key(model, n), {})]
    with ptq.workbench(REAL[model], 0) as work:
        return timed([candidate(model, name) for name in names], work)


def section(cells):
    """A table and a judgement for every model."""
    blocks = []
    for model in MODELS:
        encoder = model == ptq.ENCODER
        rows = []
        for name, mine in arms(model).items():
            found = cells.found.get(key(model, name))
            rows.append([name, "yes" if mine else "", *_row(found, encoder)])
            refused = "refused" in (found or {})
            rows[-1] += ["", ""] if refused else speed_of(cells, model, name)
        scores = ["one minus cosine"] if encoder else ["perplexity", "KL", "same top-1"]
        header = ["file, engine", "ours", "MB", *scores, "ms"]
        blocks += [f"### {model}", table([*header, "of float32 ONNX's"], rows)]
        blocks.append("\n".join(_verdicts(cells, model)) or NOT_RUN)
    return blocks


def _row(found, encoder):
    if found is None:
        return [NOT_RUN] * (2 if encoder else 4)
    if "refused" in found:
        return [f"refused: {found['refused']}", *[""] * (1 if encoder else 3)]
    row = [f"{found['megabytes']:.2f}", f"{_worse(found):.5f}"]
    if not encoder:
        row += [f"{found['kl']:.1e}", f"{100 * found['top1_agreement']:.1f} %"]
    return row


def _worse(found):
    """What is better when smaller."""
    return found["perplexity"] if "perplexity" in found else 1 - found["cosine"]


def _verdicts(cells, model):
    """For every file of another program: our smallest and fastest at its quality or better."""
    made = {n: cells.found.get(key(model, n)) for n in arms(model)}
    made = {n: c for n, c in made.items() if c and "megabytes" in c}
    lines = []
    for name, peer in made.items():
        if peer["ours"]:
            continue
        room = SAME_COSINE if model == ptq.ENCODER else SAME * _worse(peer)
        level = {n: c for n, c in made.items() if c["ours"] and _worse(c) <= _worse(peer) + room}
        lines.append(f"- {name}: {_verdict(cells, model, name, peer, level)}")
    return lines


def _verdict(cells, model, name, peer, level):
    if not level:
        return "none of ours is as good."
    small = min(level, key=lambda n: level[n]["megabytes"])
    said = f"ours at that quality or better takes {_share(level, small, peer)}"
    own = [n for n in level if n.endswith(name.rsplit(",", 1)[1])]
    if small not in own:
        best = min(own, key=lambda n: level[n]["megabytes"], default=None)
        said += f", {_share(level, best, peer)} in its engine" if own else ", none in its engine"
    times = cells.found.get(speed_key(model, "peers"), {}).get("paired", {})
    if not {*level, name} <= set(times):
        return f"{said}; speed {NOT_RUN}."
    ratios = {n: np.array(times[n]) / np.array(times[name]) for n in level}
    middle = {n: float(np.median(ratios[n])) for n in level}
    fast = min(level, key=lambda n: middle[n])
    both = [n for n in level if level[n]["megabytes"] <= peer["megabytes"] and min(ratios[n]) <= 1]
    best = min(both, key=lambda n: middle[n], default=None)
    found = f"as small and as fast: {best}, {shown(ratios[best])}" if best else "none is both"
    return (
        f"{said} and {shown(ratios[small])} of its time; the fastest of ours takes "
        f"{shown(ratios[fast])} of its time ({fast}); {found}."
    )


def _share(level, name, peer):
    return f"{level[name]['megabytes'] / peer['megabytes']:.2f} of its bytes ({name})"
