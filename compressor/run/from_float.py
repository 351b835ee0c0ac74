"""A quantized source: refused by what needs float weights, or left for what it was made from."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from compressor.errors import CompressError
from compressor.model.checkpoint import Checkpoint
from compressor.model.kv_cache import METHOD as CACHE
from compressor.model.manifest import quantized
from compressor.run.forget import WEIGHTS_REMOVED
from compressor.run.loading import load_profile
from compressor.run.profile import Profile, Stage
from compressor.run.setting import open_source


def open_model(profile: Profile) -> Checkpoint:
    """The model of a profile; under `from_float` the float one that a quantized one was made from.

    Raises:
        CompressError: as open_source; or that float model is not on this machine.
    """
    source = open_source(str(profile.model))
    if not profile.from_float or not _unfit(profile.stages, source):
        return source
    found = _parent(source, (*_beside(source), *_originals(source)))
    if found is not None:
        return found
    raise CompressError(
        f"from_float: the model that '{source.path.name}' was quantized from is not here",
        f"--model that model; all of this began with {source.manifest.base_model.get('id')}",
    )


def instead(profile: Profile, source: Checkpoint) -> str | None:
    """What the user should know of a source that is not the model they named."""
    base, named = source.manifest.base_model.get("id"), str(profile.model)
    if not profile.from_float or named == base or Path(named).expanduser() == source.path:
        return None
    taken = source.path.name if source.manifest.stages else base
    return f"{named} is quantized: this starts from {taken}, from which it was made"


def refuse_quantized(stages: tuple[Stage, ...], source: Checkpoint, main: bool = True) -> None:
    """Refuse to edit a checkpoint that is quantized: a quantizer would find nothing to do.

    Args:
        main: these are the stages of the profile, not of a baseline.

    Raises:
        CompressError: names the stage, and the model that the checkpoint was made from.
    """
    stage = _unfit(stages, source)
    if stage is None:
        return
    found = _parent(source, _beside(source))
    named = found.path if found else source.manifest.base_model.get("id")
    way = "--set from_float=true, or " if main else ""
    raise CompressError(
        f"'{source.path.name}' is quantized already, and {stage} needs float weights",
        f"{way}--model {named or 'the float checkpoint'}, from which it was made; or leave only "
        "exports in the profile",
    )


def _unfit(stages: tuple[Stage, ...], source: Checkpoint) -> str | None:
    """The first stage that needs float weights where the source has none."""
    editing = [s.method for s in stages if s.kind != "export" and s.method != CACHE]
    return editing[0] if editing and quantized(source.manifest.formats) else None


def _parent(source: Checkpoint, places: Iterable[str]) -> Checkpoint | None:
    """The very model that `source` was quantized from, at the first of these places that has it."""
    stages = source.manifest.stages
    rounded = (s for s in stages if s.method.startswith("quantize.") and s.method != CACHE)
    wanted = next((stage.parent for stage in rounded), None)
    for place in places:
        with suppress(CompressError):
            found = open_source(place)
            kept = not found.manifest.metrics.get(WEIGHTS_REMOVED)
            if kept and found.manifest.fingerprint == wanted:
                return found
    return None


def _beside(source: Checkpoint) -> Iterator[str]:
    """Stages of the run that made a checkpoint."""
    yield from map(str, sorted(source.path.resolve().parent.glob("[0-9][0-9]-*")))


def _originals(source: Checkpoint) -> Iterator[str]:
    """What the run that made a checkpoint began with: as it was typed, then its name."""
    with suppress(CompressError):
        yield str(load_profile(source.path.parent / "profile.yaml").model)
    yield str(source.manifest.base_model.get("id"))
