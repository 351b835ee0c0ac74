"""Which block of GGUF holds which of our grids, told from formats before any work.

A refusal names what would be held: groups of whole blocks, no codebook, inputs that are not
rounded, 8 bits without zero points.
"""

from typing import Any

from compressor.errors import CompressError
from compressor.model.manifest import WeightFormat, quantized
from compressor.model.model import Model
from compressor.model.tables import QuantTable
from compressor.numerics.ggml_blocks import BLOCK, BY_NAME, FORMS, Form, holds, reach

FLOATS = ("f32", "f16", "bf16")
_FITS = "quantize with bits: 8 or 4, symmetric: true and group: 32 (or a multiple), or "
_DENSE = "--set type=f16 (in a profile type: f16) to write dense float weights"


def refuse_formats(model: Model, kind: str, requantize: str | None) -> None:
    """Raise CompressError for the first weight that the options cannot store.

    Args:
        model: may lie on the meta device, with float modules in the place of tables.
        kind: the option `type`.
        requantize: the option of that name.
    """
    for name, form in model.formats.items():
        if form.side_rank is not None:
            raise CompressError(
                f"llama.cpp has no side paths, and '{name}' has one",
                "export.safetensors with side: drop leaves them out; export that directory",
            )
        if form.pattern is not None and requantize == "q4_k":
            raise CompressError(
                f"q4_k has a least value in every block and keeps no zeros, and '{name}' has them",
                "requantize to q4_0, q5_0 or q8_0, which keep them",
            )
    if requantize or kind in FLOATS:
        return
    if kind != "auto" and not quantized(model.formats):
        raise CompressError(
            f"type {kind} holds codes, and none of this model is quantized",
            f"put a quantize stage before it, or --set requantize={kind} rounds here (q8_0, q5_0, "
            "q4_0, and q4_k with llama.cpp installed)",
        )
    for name, form in model.formats.items():
        if form.bits is not None:
            _refuse(model, name, form, kind)


def _refuse(model: Model, name: str, form: WeightFormat, kind: str) -> None:
    assert form.bits is not None
    if form.codebook is not None:
        raise CompressError(
            f"the values of a block of GGUF lie at equal distances, and '{name}' has a codebook",
            _FITS + _DENSE,
        )
    if form.activation is not None:
        raise CompressError(
            f"llama.cpp rounds activations by a rule of its own, and '{name}' has another",
            "quantize without activation, or " + _DENSE,
        )
    inputs = _inputs(model, name)
    if inputs % BLOCK or (form.group or inputs) % BLOCK:
        found, held = f"groups of {form.group}", _FITS + _DENSE
        if inputs % BLOCK:
            found = f"{inputs} inputs"
            held = f"--set requantize=q8_0 rounds the other layers and leaves it float, or {_DENSE}"
        raise CompressError(f"blocks of GGUF have {BLOCK} inputs, and '{name}' has {found}", held)
    low, high = reach(form.bits, form.symmetric)
    allowed = FORMS if kind == "auto" else [BY_NAME[kind]]
    exact = [one.name for one in FORMS if one.low <= low and high <= one.high]
    perhaps = {"q4_1"} if form.bits <= 4 else set()  # that depends on zero * scale
    if not any(one.name in {*exact, *perhaps} for one in allowed):
        held = f"--set type={exact[0]} holds it" if exact else _FITS + _DENSE
        zeros = "" if form.symmetric else " with zero points"
        where = "no block of GGUF holds" if kind == "auto" else f"{kind} does not hold"
        raise CompressError(f"{where} {form.bits} bits{zeros}, as '{name}' has", held)


def _inputs(model: Model, name: str) -> int:
    owner: Any = model.module.get_submodule(name)
    return (owner.codes_OI if isinstance(owner, QuantTable) else owner.weight).shape[1]


def block_of(table: QuantTable, kind: str, name: str) -> str:
    """The block type of a table: the smallest that holds it bit for bit, or the one asked for.

    Raises:
        CompressError: the one asked for does not.
    """
    parts = (table.codes_OI, table.scale_OG, table.zero_OG)
    allowed: list[Form] = list(FORMS) if kind == "auto" else [BY_NAME[kind]]
    for form in allowed:
        if holds(form, *parts):
            return form.name
    better = next(form.name for form in FORMS if holds(form, *parts))
    raise CompressError(
        f"{kind} does not hold the weights of '{name}' bit for bit",
        f"type=auto takes {better} there",
    )
