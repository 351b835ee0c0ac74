"""Every family in every format and engine: does it load, does it agree, how large is it?

Models of families are the pico ones of tests/families.py (random weights, MLPs of 64 so that blocks
of 32 inputs fit); the real ones are two Llamas and an encoder. Weights are rounded to nearest, 8 or
4 bits in groups of 32, symmetric, embeddings and head included, or 8 bits a row with activations
rounded per token or to a static range (SmoothQuant), embeddings and head in float. `compress
export` proves every file in the engine that its manifest names; other engines run the same file on
the same probe.

A cell of the tables is *error, top-1, greedy*. Error: norm of the difference to PyTorch over the
norm, worst output and batch of the probe; where an engine rounds activations there are two, with
activations left in float and as served. Top-1: positions of the probe with the same most likely
answer, as served. Greedy: tokens of a continuation that are the same, as served. The probe's ids
are random, and pico weights are wild: as served, a real model on real text is closer. A number in
brackets is a reason, below the tables. Seconds a cell on a free core, half a minute of the real
models; these were taken on one that other work shared.
"""

import re
import tempfile
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import lab
import quantization_ptq as ptq
from cells import DATA, table
from deploy_speed import speed_of
from minitron_encoder import PACKAGE
from picos import CONFIGS, pico, workbench
from sweep import NOT_RUN

import compressor
from compressor.engines import open_engine_of
from compressor.errors import CompressError
from compressor.model.manifest import list_files, write_manifest
from compressor.model.sources import model_files, resolve
from compressor.quantize import rtn, smoothquant
from compressor.run.agreement import compare
from compressor.run.gate import EXACT
from compressor.run.prove import save_and_prove

TITLE = "Family, format, engine"
REAL = {"novels-llama": "novels-llama", ptq.ENCODER: ptq.ENCODER, "stories260K": lab.STORIES}
ALL = ("all families", "all real models")
MODELS = (*ALL, *CONFIGS, *REAL)
TABLES_FLOAT = {"embeddings": False, "head": False}
SETTINGS = {  # how weights were rounded
    "float": None,
    "int8": (rtn, {"bits": 8}),
    "int4": (rtn, {"bits": 4}),
    "int4, tables float": (rtn, {"bits": 4} | TABLES_FLOAT),
    "token": (rtn, {"group": None, "activation": "token"} | TABLES_FLOAT),
    "static": (smoothquant, {"activation": "static"} | TABLES_FLOAT),
}
ONNX, DENSE = ("onnxruntime", "openvino"), ("torch", "transformers")
FORMS = {  # what it is called: (setting, exporter, its options, engines; the first proves it)
    "onnx float32": ("float", "onnx", (), ONNX),
    "onnx int8": ("int8", "onnx", (), ONNX),
    "onnx int4": ("int4", "onnx", (), ONNX),
    "onnx int8, token": ("token", "onnx", (), ONNX),
    "onnx int8, static": ("static", "onnx", (), ONNX),
    "onnx float16": ("float", "onnx", ("dtype=float16",), ONNX),
    "gguf f16": ("float", "gguf", ("type=f16",), ("llama.cpp",)),
    "gguf q8_0": ("int8", "gguf", ("type=q8_0",), ("llama.cpp",)),
    "gguf q4_0": ("int4", "gguf", ("type=q4_0",), ("llama.cpp",)),
    "compressed_tensors int8": ("int8", "compressed_tensors", (), ("transformers",)),
    "compressed_tensors int4": (
        *("int4, tables float", "compressed_tensors"),
        *((), ("transformers",)),
    ),
    "compressed_tensors int8, token": ("token", "compressed_tensors", (), ("transformers",)),
    "compressed_tensors int8, static": ("static", "compressed_tensors", (), ("transformers",)),
    "safetensors of int4": ("int4", "safetensors", (), DENSE),
    "huffman int8": ("int8", "huffman", (), ("torch",)),
    "huffman int4": ("int4", "huffman", (), ("torch",)),
    "genai int4": ("int4", "genai", (), ("onnxruntime-genai",)),
    "genai float32": ("float", "genai", (), ("onnxruntime-genai",)),
}
TABLES = {  # heading of a table of families: beginnings of its forms
    "ONNX": ("onnx",),
    "GGUF and onnxruntime-genai": ("gguf", "genai"),
    "compressed-tensors, dense safetensors, Huffman": ("compressed", "safetensors", "huffman"),
}
NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "onnxruntime-genai": "genai"}
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff")
WIDTHS += ("encoder_ffn_dim", "decoder_ffn_dim")


def model_of(name):
    """(a fresh model, the directory its side files are in)."""
    if name in CONFIGS:
        widths = {key: 64 for key in WIDTHS if key in CONFIGS[name][1]}
        return pico(name, **widths), Path(tempfile.mkdtemp())
    return ptq.original(REAL[name]), place_of(name)


def place_of(name):
    """The directory of a real model."""
    return resolve(PACKAGE).path if name == ptq.ENCODER else DATA / "checkpoints" / name


def checkpoint(name, setting, folder):
    """A model after rounding, saved as a stage would."""
    model, parent = model_of(name)
    if SETTINGS[setting] is not None:
        method, options = SETTINGS[setting]
        if method is smoothquant and name in REAL:
            options = options | ptq.DATA_OPTIONS
        options = method.Options(**options, uneven="channel")
        with surroundings(name, model) as work:
            method.run(model, options, work)
    save(model, folder, parent, name)


def surroundings(name, model):
    """What a stage reads: random ids, or a real model's own text."""
    return nullcontext(workbench(model)) if name in CONFIGS else ptq.workbench(REAL[name], 0)


def save(model, folder, parent, name):
    """Save with a manifest, as `compress run` does."""
    manifest = save_and_prove(model, folder, parent)
    manifest.base_model.update(id=name, sha256="0" * 64, license=None)
    manifest.files.update(list_files(folder))
    write_manifest(folder, manifest)


def kept(name, make):
    """The directory that `make` fills, made once; its name has no blanks."""
    return lab.kept(f"deploy-{name}".replace(" ", "-").replace(",", ""), make)


def source_of(name, setting):
    """The checkpoint of a setting."""
    return kept(f"{name} {setting}", partial(checkpoint, name, setting))


def exported(name, source, to, options=()):
    """The artefact of a checkpoint."""

    def export(folder):
        compressor.export_checkpoint(str(source), to, folder / "model", list(options))

    return kept(name, export) / "model"


def artifact(name, form):
    """The artefact of a form."""
    setting, to, options, _ = FORMS[form]
    return exported(f"{name} {form}", source_of(name, setting), to, options)


def said(served, exact=None):
    """What a cell keeps of comparisons with the probe."""
    differences = served["differences"]
    greedy = differences.get("greedy")
    return {
        "served": max(served["errors"].values()),
        "exact": None if exact is None else max(exact.values()),
        "top1": differences.get("top1_agreement"),
        "greedy": None if greedy is None else [greedy["equal"], greedy["tokens"]],
    }


def proved(metrics):
    """What the gate found."""
    both = "exact" in metrics["differences"]
    served = {"errors": metrics["served"], "differences": metrics["differences"]["served"]}
    return said(served, metrics["agreement"] if both else None)


def probed(engine, path):
    """What another engine gives for the same file and probe."""
    with closing(open_engine_of(engine, path)) as opened:
        found = compare(opened, path, EXACT)
    return said({"errors": found.errors, "differences": found.differences()})


def cell(name, form):
    """One file in all its engines, or why there is none."""
    first, *others = FORMS[form][3]
    try:
        path = artifact(name, form)
    except CompressError as error:
        return {"refused": error.what}
    manifest = compressor.Checkpoint.open(path).manifest
    assert manifest.engine == first, f"{manifest.engine} proves it: install {first}"
    engines = {first: proved(manifest.metrics)}
    for engine in others:
        try:
            engines[engine] = probed(engine, path)
        except CompressError as error:
            engines[engine] = {"refused": error.what}
    return {"bytes": sum(f.stat().st_size for f in model_files(path)), "engines": engines}


def key(name, form):
    return f"matrix {name} {form}"


def run(cells, model, seeds):
    """Every form of a model, or of all of a kind; graphs last, which take longest."""
    chosen = {ALL[0]: list(CONFIGS), ALL[1]: list(REAL)}.get(model, [model])
    for form in sorted(FORMS, key=lambda form: form.startswith(("onnx", "genai"))):
        for name in chosen:
            cells.run(key(name, form), partial(cell, name, form))


def section(cells):
    """The real models, then families, then reasons."""
    reasons = []
    blocks = [block for name in REAL for block in _real(cells, name, reasons)]
    for heading, starts in TABLES.items():
        forms = [form for form in FORMS if form.startswith(starts)]
        columns = {
            f"{form}, {NAMES.get(engine, engine)}": (form, engine)
            for form in forms
            for engine in FORMS[form][3]
        }
        rows = [
            [name, *(_said(cells, name, *column, reasons) for column in columns.values())]
            for name in CONFIGS
        ]
        blocks += [f"### Families: {heading}", table(["family", *columns], rows)]
    sizes = [[name, *(_bytes(cells, name, form) for form in FORMS)] for name in CONFIGS]
    blocks += ["### Families: kB of weight files", table(["family", *FORMS], sizes)]
    listed = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return [*blocks, "### Reasons", "\n".join(listed) or "None."]


def _real(cells, name, reasons):
    """A row for every form and engine of a real model."""
    rows = []
    for form, (_, _, _, engines) in FORMS.items():
        found = cells.found.get(key(name, form))
        megabytes = f"{found['bytes'] / 1e6:.2f}" if found and "bytes" in found else ""
        for engine in engines:
            agrees = _said(cells, name, form, engine, reasons)
            speed = ["", ""]
            if engine not in DENSE and not agrees.startswith("["):
                speed = speed_of(cells, name, f"{form} in {engine}")
            rows.append([f"{form}, {NAMES.get(engine, engine)}", megabytes, agrees, *speed])
    header = ["file, engine", "MB", "error, top-1, greedy"]
    return [f"### {name}", table([*header, "ms", "of float32 ONNX's"], rows)]


def _said(cells, name, form, engine, reasons):
    """What a cell of the tables says."""
    found = cells.found.get(key(name, form))
    if found is None:
        return NOT_RUN
    found = found if "refused" in found else found["engines"][engine]
    if "refused" in found:
        reason = re.sub(r"\d+,\d+", "N", found["refused"])
        if reason not in reasons:
            reasons.append(reason)
        return f"[{reasons.index(reason) + 1}]"
    exact = "" if found["exact"] is None else f"{found['exact']:.0e} / "
    parts = [f"{exact}{found['served']:.0e}"]
    if found["top1"] is not None:
        parts.append(f"{100 * found['top1']:.0f} %")
    if found["greedy"] is not None:
        parts.append("/".join(map(str, found["greedy"])))
    return ", ".join(parts)


def _bytes(cells, name, form):
    found = cells.found.get(key(name, form))
    if found is None:
        return NOT_RUN
    return f"{found['bytes'] / 1e3:.0f}" if "bytes" in found else ""
