"""A model is saved, loaded back and compared; only what agrees becomes a stage."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.errors import Refused
from compressor.model.checkpoint import load_directory
from compressor.model.compressed_config import layout
from compressor.model.count import count_nonzero, count_parameters
from compressor.model.forward import output_mask, outputs
from compressor.model.layers import float_inputs
from compressor.model.manifest import Manifest, quantized
from compressor.model.model import Model
from compressor.model.probe import largest_difference, probe_batches, write_probe
from compressor.model.saving import save
from compressor.model.sparse import broken_promise
from compressor.model.tables import QuantTable
from compressor.run.machine import give_back_memory

# Relative error allowed between the model in memory and the same model saved and loaded: storing
# bfloat16 rounds every weight to 8 bits of mantissa; float32 and packed codes lose nothing.
RELOAD_TOLERANCE = {"float32": 1e-6, "float16": 5e-3, "bfloat16": 5e-2}


def save_and_prove(
    model: Model,
    directory: Path,
    parent: Path,
    spill: Path | None = None,
) -> Manifest:
    """Save a model, load it back, compare, and leave a probe of the loaded one.

    The model is gone afterwards: its weights are given back before the saved ones are loaded, so
    that there is never more than one of the two in memory; with `spill` neither is as a whole.

    Args:
        model: what a stage made.
        directory: an existing directory to save it in.
        parent: checkpoint directory whose side files travel along.
        spill: see load_directory.

    Raises:
        Refused: the loaded model gives other outputs than the one in memory, lost a tie, or has
            other zeros than its formats say.
    """
    model.module.eval().requires_grad_(False)
    batches, plain = probe_batches(model), _rounds_badly(model)
    expected = _answers(model, batches, plain)
    tied = _tied(model)
    save(model, directory, parent)
    for name, tensors in model.beside.items():
        tensors.write(directory / name)
    model.module.to("meta")
    give_back_memory()
    tolerance = RELOAD_TOLERANCE[model.source_dtype]
    formats, notes, family = model.formats, model.notes, model.family
    loaded = load_directory(directory, formats, spill)
    found = _answers(loaded, batches, plain)
    for batch, got, wanted in zip(batches, found, expected, strict=True):
        errors = largest_difference(wanted, got, output_mask(batch))
        if max(errors.values()) > tolerance:
            raise Refused(
                f"the saved model disagrees with the one in memory ({errors})",
                "NaN or overflow in the stored dtype? try dtype: float32",
            )
    if tied and not _tied(loaded):
        raise Refused("the saved model lost its tied embedding", "report this as a bug")
    broken = broken_promise(loaded, formats)
    if broken:
        raise Refused(
            f"the saved model has other zeros than it says: {broken}", "report this as a bug"
        )
    served = _answers(loaded, batches, False) if plain else found
    write_probe(directory, list(zip(batches, served, strict=True)))
    counted = {
        "parameters": count_parameters(loaded.module),
        "nonzero_parameters": count_nonzero(loaded.module),
    }
    metrics: dict[str, Any] = counted | {"notes": notes}
    if quantized(formats):
        metrics["layout"] = layout(loaded.module, formats)
    return Manifest(
        "checkpoint", family.model_type, base_model={}, formats=formats, metrics=metrics
    )


def _rounds_badly(model: Model) -> bool:
    """Whether inputs are rounded to 8 bits and float weights to few.

    What is little changed by the one may take another step of the other, so such a model is
    compared with float inputs.
    """
    rounded = any(form.activation for form in model.formats.values())
    return rounded and model.source_dtype != "float32"


def _answers(
    model: Model, batches: list[dict[str, Tensor]], plain: bool
) -> list[dict[str, Tensor]]:
    """Outputs of every batch, where `plain` with float inputs of all Linears."""
    with float_inputs(model.module) if plain else nullcontext():
        return [outputs(model, batch) for batch in batches]


def _tied(model: Model) -> bool:
    module: Any = model.module
    head = module.get_output_embeddings()
    if head is None:
        return False
    inner = module.get_input_embeddings()
    # codes first: the weight of a quantized table is made anew whenever it is asked for
    tables = [m.codes_OI if isinstance(m, QuantTable) else m.weight for m in (head, inner)]
    return tables[0].data_ptr() == tables[1].data_ptr()
