"""What a user might pick instead: files of other programs, made of the same checkpoint.

ONNX Runtime: `quantize_dynamic` with its defaults, of our float32 graph. llama.cpp: the function
behind its llama-quantize, of our float32 file, without an importance matrix. onnxruntime-genai:
its own builder, `-p int4 -e cpu`. OpenVINO: nncf.compress_weights without data, of our float32
graph with plain attention, as it does not know ONNX Runtime's.
"""

import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from deploy_matrix import artifact, exported, place_of, source_of

LEFT = ("manifest.json", "probe.safetensors", "README.md", "model.*")  # not of the peer's file


def bare(source, folder):
    """A directory with config and tokenizer alone; it is `folder`/model."""
    return Path(shutil.copytree(source, folder / "model", ignore=shutil.ignore_patterns(*LEFT)))


def dynamic(model, folder):
    """ONNX Runtime's quantize_dynamic."""
    from onnxruntime.quantization import quantize_dynamic

    source = artifact(model, "onnx float32")
    quantize_dynamic(source / "model.onnx", bare(source, folder) / "model.onnx")


def llama(model, folder, kind):
    """llama.cpp's own quantization; `kind` is called as in llama-quantize."""
    library = import_module("llama_cpp")
    source = exported(f"{model} gguf f32", source_of(model, "float"), "gguf", ["type=f32"])
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = 1
    files = (source / "model.gguf", bare(source, folder) / "model.gguf")
    code = library.llama_model_quantize(*(str(f).encode() for f in files), settings)
    assert code == 0, f"llama_model_quantize says {code}"


def builder(model, folder, precision):
    """onnxruntime-genai's model builder."""
    out = bare(artifact(model, "onnx float32"), folder)
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        where = ["-m", str(place_of(model)), "-o", str(out), "-c", cache]
        subprocess.run([*command, *where, "-p", precision, "-e", "cpu"], check=True, cwd=cache)


def nncf(model, folder, mode, **more):
    """OpenVINO's weight compression."""
    openvino, library = import_module("openvino"), import_module("nncf")
    form = f"{model} onnx float32 plain"
    source = exported(form, source_of(model, "float"), "onnx", ["attention=plain"])
    graph = openvino.Core().read_model(str(source / "model.onnx"))
    packed = library.compress_weights(graph, mode=library.CompressWeightsMode[mode], **more)
    openvino.save_model(packed, bare(source, folder) / "model.xml")
