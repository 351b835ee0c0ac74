"""Times, which want a machine without other work; rounds over all files there are.

One run for the files of the comparison with others, and one for each engine of the matrix. Five
rounds, one thread, every file in a process of its own; a decode step behind a prompt of 128 tokens,
or a forward of 128. Their numbers are in the tables above and below; here is how calm it was.
*Calm* files are those whose ratios to the first file differ by less than a fifth over rounds;
*spread* is that of the worst file's own times, between quartiles.
"""

from functools import partial

import deploy_matrix as matrix
import deploy_peers as peers
import numpy as np
import quantization_ptq as ptq
from cells import table
from deploy_speed import FIRST, speed_key, timed
from sweep import NOT_RUN

from compressor.run.candidates import Candidate

TITLE = "Times"
MODELS = tuple(matrix.REAL)
CALM = 0.2
GROUPS = ("peers", "onnxruntime", "openvino", "llama.cpp", "onnxruntime-genai")


def groups(model):
    """What is timed of a model; onnxruntime-genai serves decoders."""
    return GROUPS[:-1] if model == ptq.ENCODER else GROUPS


def of_matrix(cells, model, engine):
    """Files of the matrix in one engine, against the float32 graph in ONNX Runtime."""
    forms = [
        form
        for form, (*_, engines) in matrix.FORMS.items()
        if engine in engines
        and "refused"
        not in cells.found[matrix.key(model, form)].get("engines", {}).get(engine, {"refused": 1})
    ]
    files = {f"{form} in {engine}": matrix.artifact(model, form) for form in forms}
    found = [Candidate(FIRST, matrix.artifact(model, "onnx float32"))]
    found += [Candidate(name, path, engine) for name, path in files.items()]
    with ptq.workbench(matrix.REAL[model], 0) as work:
        return timed(found, work)


def run(cells, model, seeds):
    """The comparison first, then the matrix."""
    for group in groups(model):
        make = partial(peers.times, cells, model)
        if group != "peers":
            make = partial(of_matrix, cells, model, group)
        cells.run(speed_key(model, group), make)


def section(cells):
    """How calm every run was."""
    rows = []
    for model in MODELS:
        for group in groups(model):
            found = cells.found.get(speed_key(model, group))
            row = [NOT_RUN, "", "", ""]
            if found is not None:
                calm = sum(max(p) - min(p) <= CALM * np.median(p) for p in found["paired"].values())
                noise = [f"{100 * found['noise'][k]:.0f} %" for k in ("twice", "spread", "share")]
                row = [f"{calm} of {len(found['paired'])}", *noise]
            rows.append([f"{model}, {group}", *row])
    header = ["run", "calm files", "same file twice", "spread of rounds", "share of its core"]
    return [table(header, rows)]
