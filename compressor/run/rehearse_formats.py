"""What a rehearsal says of weight formats: those of the source, of a quantizer and of exports."""

from dataclasses import replace

from compressor.errors import CompressError
from compressor.export import (
    compressed_tensors,
    genai,
    gguf,
    huffman,
    onnx,
    onnx_formats,
    safetensors,
)
from compressor.export.holders import naming_holders
from compressor.model.checkpoint import Checkpoint
from compressor.model.kv_cache import METHOD as CACHE
from compressor.model.manifest import WeightFormat
from compressor.model.model import Model
from compressor.model.sources import CACHE as CACHE_FILE
from compressor.prune.sparsity import SparseOptions, targets
from compressor.quantize import cache, qsd
from compressor.quantize.mixed import refuse_small
from compressor.quantize.planned import planned
from compressor.quantize.targets import quantizable, refuse_uneven
from compressor.quantize.weights import GridOptions, WeightOptions, refuse_no_tables
from compressor.run.profile import Stage


def check_cache(stages: tuple[Stage, ...], source: Checkpoint, made: list[Model]) -> None:
    """Refuse what a cache in 8 bits cannot be made for, and what may not follow it."""
    begins = [i for i, stage in enumerate(stages) if stage.method == CACHE]
    if begins:
        cache.refuse(made[begins[0]])
    stored = (source.path / CACHE_FILE).is_file()
    later = stages if stored else stages[begins[0] + 1 :] if begins else ()
    for stage in later:
        if stage.method == "export.onnx":
            onnx.refuse_cache(made[0], stage.options)
        elif stage.kind == "export":
            refuse_cached(stage.method)
        elif stage.method == CACHE:
            raise CompressError(f"a second {CACHE} stage", "keep one of them")
        else:
            raise CompressError(
                f"{stage.method} would change what {CACHE} has measured",
                f"--model a checkpoint from before its {CACHE} stage"
                if stored
                else f"put {CACHE} last, before the exports",
            )


def refuse_cached(method: str) -> None:
    """Refuse an export of a model whose cache is in 8 bits, but for export.onnx."""
    raise CompressError(
        f"{method} cannot say that the cache is in 8 bits",
        f"use export.onnx, or leave {CACHE} out",
    )


def check_packed(stages: tuple[Stage, ...], source: Checkpoint) -> None:
    """Refuse `packed` where no stage makes weights sparse, or one quantizes them."""
    if not any(getattr(stage.options, "packed", False) for stage in stages):
        return
    formats = dict(source.manifest.formats)
    for stage in stages:
        pattern, bits = (getattr(stage.options, key, None) for key in ("pattern", "bits"))
        formats[stage.method] = WeightFormat(pattern=pattern, bits=bits)
    safetensors.refuse_unpackable(formats)


def check_jointly_sparse(model: Model, sparse: SparseOptions) -> None:
    """Refuse what quantize.gptq could not prune, in the words of its options."""
    try:
        targets(model, sparse)
    except CompressError as error:
        raise CompressError(error.what, f"sparse.{error.hint}") from error


def check_groups(stages: tuple[Stage, ...], made: list[Model], exports: list[str]) -> None:
    """Refuse groups that do not divide, a budget that is too small, and what no export can hold."""
    choices: list[dict[str, WeightFormat]] = [made[-1].formats]
    for stage, model in zip(stages, made, strict=False):
        if isinstance(stage.options, WeightOptions):
            own = stage.options
            if own.uneven == "refuse":
                refuse_uneven(model, quantizable(model, own.embeddings, own.head), own.row_group)
            if isinstance(own, GridOptions):
                refuse_small(model, own)
                refuse_no_tables(model, own)
            choices = planned(model, own).choices
        elif isinstance(stage.options, qsd.Options):
            choices = [qsd.formats(model, stage.options)]
    if "genai" in exports:
        genai.refuse(made[-1])
    for formats in choices:
        model = replace(made[-1], formats=dict(formats))
        with naming_holders(model):
            _refuse_formats(model, stages, exports)


def _refuse_formats(model: Model, stages: tuple[Stage, ...], exports: list[str]) -> None:
    """Refuse weights that an export of the profile cannot hold."""
    if {"onnx", "genai"} & set(exports):
        onnx_formats.refuse(model.formats)
    if "compressed_tensors" in exports:
        compressed_tensors.refuse(model.module, model.formats)
    if "huffman" in exports:
        huffman.refuse(model.formats)
    for stage in stages:
        if isinstance(stage.options, gguf.Options):
            gguf.refuse(model, stage.options)
