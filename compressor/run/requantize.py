"""A quantized source: refused by what needs float weights, or left for what it was made from."""

from contextlib import suppress

from compressor.errors import CompressError
from compressor.model.checkpoint import Checkpoint
from compressor.model.kv_cache import METHOD as CACHE
from compressor.model.manifest import quantized, read_manifest
from compressor.model.sources import resolve
from compressor.run.forget import WEIGHTS_REMOVED
from compressor.run.profile import Profile, Stage
from compressor.run.setting import open_source


def open_model(profile: Profile) -> Checkpoint:
    """The model of a profile; under `requantize` the float one that a quantized one was made from.

    Raises:
        CompressError: as open_source; or that float model is not on this machine.
    """
    source = open_source(str(profile.model))
    if not profile.requantize or not _unfit(profile.stages, source):
        return source
    found = _float_parent(source)
    if found is None:
        raise CompressError(
            f"requantize: the float model that '{source.path.name}' was made from is not here",
            f"--model that model, made from {source.manifest.base_model.get('id')}",
        )
    return found


def instead(profile: Profile, source: Checkpoint) -> str | None:
    """What the user should know of a source that is not the model they named."""
    if not profile.requantize or resolve(str(profile.model)).path == source.path:
        return None
    return f"{profile.model} is quantized: this starts from {source.path.name}, which is float"


def refuse_requantized(stages: tuple[Stage, ...], source: Checkpoint) -> None:
    """Refuse to edit a checkpoint that is quantized: a quantizer would find nothing to do.

    Raises:
        CompressError: names the stage, and the model that the checkpoint was made from.
    """
    stage = _unfit(stages, source)
    if stage is None:
        return
    found = _float_parent(source)
    named = found.path if found else source.manifest.base_model.get("id")
    way = "requantize: true, or " if found else ""
    raise CompressError(
        f"'{source.path.name}' is quantized already, and {stage} needs float weights",
        f"{way}--model {named or 'the float checkpoint'}, from which it was made; or leave only "
        "exports in the profile",
    )


def _unfit(stages: tuple[Stage, ...], source: Checkpoint) -> str | None:
    """The first stage that needs float weights where the source has none."""
    editing = [s.method for s in stages if s.kind != "export" and s.method != CACHE]
    return editing[0] if editing and quantized(source.manifest.formats) else None


def _float_parent(source: Checkpoint) -> Checkpoint | None:
    """The last model with float weights before a quantized one; None: it is not here.

    A stage beside it, or, where nothing but a quantizer has been at work, the original.
    """
    records = source.manifest.stages
    known = {record.parent for record in records}
    for beside in sorted(source.path.resolve().parent.glob("[0-9][0-9]-*"), reverse=True):
        with suppress(CompressError):
            found = read_manifest(beside)
            whole = found.files and not found.metrics.get(WEIGHTS_REMOVED)  # a source has no files
            if whole and found.fingerprint in known and not quantized(found.formats):
                return Checkpoint(beside, found)
    base = source.manifest.base_model
    if base.get("id") and all(r.method.startswith("quantize.") for r in records):
        with suppress(CompressError):
            found = open_source(base["id"])
            if found.manifest.base_model.get("sha256") == base.get("sha256"):
                return found
    return None
