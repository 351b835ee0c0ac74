"""What the library compressed-tensors can express, and what config.json says of weights in it.

The forms are those of compressed.py.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from compressor.errors import CompressError
from compressor.model.conv1d import turned_names
from compressor.model.layers import QuantEmbedding
from compressor.model.manifest import WeightFormat
from compressor.model.tables import QuantTable

PACKED, NAIVE, INTEGER = "pack-quantized", "naive-quantized", "int-quantized"
# transformers asks these for the weights of their Linears before it has unpacked them
_NEVER_PACKED = ("t5",)


def obstacle(module: nn.Module, formats: Mapping[str, WeightFormat]) -> CompressError | None:
    """Why plain transformers could not load a model in this layout, and what would help; or None.

    Decided by names, shapes and formats: the module may lie on the meta device, with Quant modules
    or still without them.
    """
    if type(module).__name__.startswith("QsdTransformer"):
        return CompressError(
            "transformers' layers of compressed-tensors do not sum integers, as spikes need",
            "use export.onnx, or export.safetensors, which transformers loads once "
            "compressor.model.qsd_modeling is imported",
        )
    if turned_names(type(module), module.config):
        return CompressError(
            f"compressed-tensors has no layer like those of {type(module).__name__}, which are "
            "stored with inputs first",
            "use export.safetensors or export.onnx",
        )
    unpacked = unpacked_of(module, formats)
    for name, form in formats.items():
        why = _refusal(form, name in unpacked)
        if why is not None:
            return CompressError(f"compressed-tensors has no form for '{name}': {why[0]}", why[1])
    return None


def _refusal(form: WeightFormat, unpacked: bool) -> tuple[str, str] | None:
    """(what cannot be expressed, which options can)."""
    if form.side_rank is not None:
        return "it has a side path", "export.safetensors with side: drop leaves side paths out"
    if form.bits is None:
        return None
    if form.activation is not None and form.activation.get("scaled"):
        return "its inputs are multiplied at run time", "quantize with unfolded: plain"
    if form.codebook is not None:
        return (
            f"its points are a codebook ({form.codebook})",
            "quantize.rtn makes even grids, and so does quantize.distilled with bucket: group",
        )
    if form.bits < 8 and unpacked:
        return (
            f"transformers loads it with 8 bits only, not {form.bits}",
            "quantize with bits: 8, or where it is an embedding table with table_bits: 8, or with "
            "embeddings: false (and head: false where the two are tied)",
        )
    if form.bits < 8 and not form.symmetric:
        return (
            f"transformers does not load zero points of {form.bits} bits",
            "quantize with symmetric: true, or bits: 8",
        )
    return None


def layout(module: nn.Module, formats: Mapping[str, WeightFormat]) -> dict[str, str]:
    """How `quantized_files` stores a model, for its manifest: name [, why, instead]."""
    found = obstacle(module, formats)
    if found is None:
        return {"name": "compressed-tensors"}
    return {"name": "compress", "why": found.what, "instead": found.hint}


def quantization_config(module: nn.Module, formats: Mapping[str, WeightFormat]) -> dict[str, Any]:
    """What config.json says of the weights: one group for all modules of one kind.

    Targets are names of modules. Linears without codes are listed in `ignore`, as readers other
    than transformers want.
    """
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    unpacked = unpacked_of(module, formats)
    groups: dict[str, list[str]] = {}
    schemes: dict[str, dict[str, Any]] = {}
    for name, form in formats.items():
        if form.bits is not None:
            scheme = _scheme(form, name in unpacked)
            groups.setdefault(repr(scheme), []).append(name)
            schemes[repr(scheme)] = scheme
    found = [QuantizationScheme(targets=names, **schemes[key]) for key, names in groups.items()]
    used = {str(scheme["format"]) for scheme in schemes.values()}
    linears = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    config = QuantizationConfig(
        config_groups={f"group_{number}": scheme for number, scheme in enumerate(found)},
        format=used.pop() if len(used) == 1 else "mixed-precision",
        quantization_status="compressed",  # type: ignore[arg-type]
        ignore=[name for name in linears if formats.get(name, WeightFormat()).bits is None],
    )
    return config.model_dump(mode="json", exclude_none=True)


def _scheme(form: WeightFormat, unpacked: bool) -> dict[str, Any]:
    """The arguments of a QuantizationScheme, but for its targets."""
    from compressed_tensors.quantization import QuantizationArgs

    assert form.bits is not None
    strategy = "channel" if form.group is None else "group"
    weights = QuantizationArgs(
        num_bits=form.bits,
        symmetric=form.symmetric,
        strategy=strategy,  # type: ignore[arg-type]
        group_size=form.group,
    )
    scheme: dict[str, Any] = {"weights": weights, "format": form_of(form, unpacked)}
    if form.activation is not None:
        scheme["input_activations"] = _activation(form.activation)
    return scheme


def _activation(stated: Mapping[str, Any]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=stated["bits"],
        symmetric=stated["per"] == "token",  # theirs, by max|x| / 127.5; ours divides by 127
        strategy=stated["per"],
        dynamic=stated["dynamic"],
    )


def form_of(form: WeightFormat, unpacked: bool) -> str:
    if form.activation is not None:
        return INTEGER
    return NAIVE if unpacked or not form.symmetric else PACKED


def unpacked_of(module: Any, formats: Mapping[str, WeightFormat]) -> set[str]:
    """Names of those that cannot be packed: embeddings, and what shares their table."""
    named = dict(module.named_modules(remove_duplicate=False))
    tables = {name: named[name] for name, form in formats.items() if form.bits is not None}
    if module.config.model_type in _NEVER_PACKED:
        return set(tables)
    kinds = (nn.Embedding, QuantEmbedding)
    shared = {_table(m) for m in tables.values() if isinstance(m, kinds)}
    return {name for name, table in tables.items() if _table(table) in shared}


def _table(module: nn.Module) -> int:
    """Identity of the weight of a module, quantized or not."""
    return id(module.codes_OI if isinstance(module, QuantTable) else module.weight)
