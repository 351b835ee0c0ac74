"""Engines: what runs a model. Measures see only this, so torch and ONNX share their code."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from compressor.errors import CompressError
from compressor.model.manifest import NAME as MANIFEST
from compressor.model.manifest import WeightFormat, read_manifest

if TYPE_CHECKING:  # a process that serves ONNX and never touches a tensor of torch stays small
    from torch import Tensor


GRAPHS = ("onnxruntime", "onnxruntime-genai")  # those that serve our ONNX directories
GGUF = ("gguf", "llama.cpp")  # those that serve a model.gguf
ENGINES = ("torch", "transformers", *GRAPHS, "openvino", *GGUF)


class Extra(NamedTuple):
    """What an engine needs beside `pip install compress`."""

    module: str
    package: str
    extra: str


EXTRAS = {
    "onnxruntime-genai": Extra("onnxruntime_genai", "onnxruntime-genai", "genai"),
    "openvino": Extra("openvino", "openvino", "openvino"),
    "gguf": Extra("gguf", "gguf", "gguf"),
    "llama.cpp": Extra("llama_cpp", "llama_cpp_python", "llama-cpp"),
}
# what an engine may give; the first there is says the most about a model
OUTPUTS = ("sentence_embedding", "last_hidden_state", "logits")


class Engine(Protocol):
    """A loaded model.

    `outputs` takes a batch (input_ids [B, S] int64, attention_mask [B, S] int64, optionally
    token_type_ids; or pixel_values; of an encoder-decoder also decoder_input_ids [B, T] and
    decoder_attention_mask, and input_features where the source is sound; other keys are ignored)
    and returns float32 tensors: encoders `last_hidden_state` [B, S, H] and, with a pooling config,
    `sentence_embedding` [B, H]; classifiers and decoders `logits`.

    `prefill` runs a prompt (the decoder's, and the source with it) and returns the logits of every
    position [B, S, V] with a cache; `decode` runs one more token [B, 1] on a cache. Encoders raise
    CompressError on both.
    """

    name: str  # one of ENGINES
    path: Path

    def outputs(self, batch: "dict[str, Tensor]") -> "dict[str, Tensor]": ...

    def prefill(self, batch: "dict[str, Tensor]") -> "tuple[Tensor, Any]": ...

    def decode(self, token: "Tensor", cache: Any) -> "tuple[Tensor, Any]": ...

    def close(self) -> None: ...


def installed(name: str) -> bool:
    """Whether the library of an engine can be imported here; it is not imported."""
    spec = find_spec(EXTRAS[name].module) if name in EXTRAS else None
    return name not in EXTRAS or (spec is not None and spec.origin is not None)  # no mere folder


def install_line(name: str) -> str:
    """What to type to get the library of an engine."""
    return f"python -m pip install 'compress[{EXTRAS[name].extra}]'"


def refuse_missing(name: str) -> None:
    """Raise CompressError where the library of an engine is not installed."""
    if not installed(name):
        other = "gguf: in front of the directory, which reads the file into PyTorch"
        if name not in GGUF:
            other = "onnxruntime: in front of the directory, which runs the same graph"
        hint = install_line(name)
        raise CompressError(
            f"{name} is not installed", hint if name == "gguf" else f"{hint}, or write {other}"
        )


def engine_name(path: Path) -> str:
    """Name of the engine that serves a directory: the manifest's for an artefact, else torch.

    Raises:
        CompressError: it is no directory, or its manifest is damaged.
    """
    if not path.is_dir():
        raise CompressError(f"'{path}' is no directory", "name a checkpoint or an exported model")
    if not (path / MANIFEST).is_file():
        return "torch"
    manifest = read_manifest(path)
    return (manifest.engine or "torch") if manifest.kind == "artifact" else "torch"


def serving(path: Path, asked: str | None) -> str:
    """Name of the engine that is to run a directory: the one asked for, else the manifest's.

    Raises:
        CompressError: that engine is not installed or cannot read such a directory, or see
            `engine_name`.
    """
    own = engine_name(path) if asked is None or (path / MANIFEST).is_file() else asked
    refuse_missing(asked or own)
    if asked is None or asked == own:
        return own
    fit = next((kind for kind in ((*GRAPHS, "openvino"), GGUF) if own in kind), (own,))
    if asked not in fit:
        raise CompressError(
            f"'{path.name}' is for {own}; {asked} cannot run it",
            "export.onnx and export.genai: onnxruntime:, genai:, openvino:; export.gguf: gguf:, "
            "llama.cpp:",
        )
    return asked


def open_engine(path: str | Path, threads: int | None = None) -> Engine:
    """Open a directory in the engine that serves it.

    Args:
        path: an exported directory, a checkpoint of ours, or a plain Hugging Face directory.
        threads: threads the engine may use; None leaves the choice to it.

    Raises:
        CompressError: the directory is none of these, or no engine of ours serves it.
    """
    return open_engine_of(engine_name(Path(path)), Path(path), threads)


def refuse_device(name: str, path: Path, device: str) -> None:
    """Raise CompressError for an engine that runs on the CPU only."""
    if device != "cpu" and name != "onnxruntime":
        raise CompressError(
            f"'{path.name}' runs in {name}, and --device {device} is for ONNX Runtime",
            "leave --device out, or measure directories of export.onnx; those of export.genai run "
            "in ONNX Runtime as onnxruntime:DIR",
        )


def open_engine_of(
    name: str,
    path: Path,
    threads: int | None = None,
    formats: dict[str, WeightFormat] | None = None,
    device: str = "cpu",
) -> Engine:
    """Open a directory in a named engine, whether or not it has a manifest yet.

    Args:
        formats: what its manifest will say, where there is none yet.
        device: "cpu", or the execution provider of ONNX Runtime, such as "cuda".

    Raises:
        CompressError: there is no engine of that name, or it cannot load the directory.
    """
    refuse_device(name, path, device)
    if name == "torch":
        from compressor.engines.torch import TorchEngine

        return TorchEngine(path, threads, formats)
    if name == "transformers":
        from compressor.engines.plain import TransformersEngine

        return TransformersEngine(path, threads)
    if name == "onnxruntime":
        from compressor.engines.onnx_session import find_provider
        from compressor.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, threads, provider=find_provider(device))
    if name == "onnxruntime-genai":
        from compressor.engines.genai import GenaiEngine

        return GenaiEngine(path, threads)
    if name == "openvino":
        from compressor.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(path, threads)
    if name == "gguf":
        from compressor.engines.gguf import GgufEngine

        return GgufEngine(path, threads)
    if name == "llama.cpp":
        from compressor.engines.llama_cpp import LlamaCppEngine

        return LlamaCppEngine(path, threads)
    raise CompressError(
        f"'{path.name}' asks for the engine '{name}', which is not here",
        f"engines: {', '.join(ENGINES)}",
    )
