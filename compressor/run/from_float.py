"""A quantized source: refused by what needs float weights, or left for what it was made from."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

from compressor.errors import CompressError
from compressor.model.checkpoint import Checkpoint
from compressor.model.kv_cache import METHOD as CACHE
from compressor.model.manifest import quantized
from compressor.model.sources import resolve
from compressor.run.forget import WEIGHTS_REMOVED
from compressor.run.layout import stage_directories
from compressor.run.loading import load_profile
from compressor.run.profile import Profile, Stage
from compressor.run.setting import open_source


def open_model(profile: Profile) -> Checkpoint:
    """The model of a profile; under `from_float` the very one that a quantized one was made from.

    That is looked for beside it, where the run that quantized it began, and on the hub if it came
    from there.

    Raises:
        CompressError: as open_source; or that model is nowhere.
    """
    source = open_source(str(profile.model))
    if not profile.from_float or not _unfit(profile.stages, source):
        return source
    found = _parent(source, chain(_beside(source), _originals(source)))
    if found is not None:
        return found
    raise CompressError(
        f"from_float: the model that '{source.path.name}' was quantized from is not here",
        f"--model that model; all of this began with {source.manifest.base_model.get('id')}",
    )


def instead(profile: Profile, source: Checkpoint) -> str | None:
    """What the user should know of a source that is not the model they named."""
    if not profile.from_float or resolve(str(profile.model)).path == source.path:
        return None
    taken = source.path.name if source.manifest.stages else source.manifest.base_model["id"]
    return f"{profile.model} is quantized: this starts from {taken}, from which it was made"


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


def _parent(source: Checkpoint, models: Iterable[Callable[[], Checkpoint]]) -> Checkpoint | None:
    """The very model that `source` was quantized from, the first of these that is it."""
    stages = source.manifest.stages
    rounded = (s for s in stages if s.method.startswith("quantize.") and s.method != CACHE)
    wanted = next((stage.parent for stage in rounded), None)
    for find in models:
        with suppress(CompressError):
            found = find()
            kept = not found.manifest.metrics.get(WEIGHTS_REMOVED)
            if kept and found.manifest.fingerprint == wanted:
                return found
    return None


def _beside(source: Checkpoint) -> Iterator[Callable[[], Checkpoint]]:
    """Stages of the run that made a checkpoint."""
    for place in stage_directories(source.path.resolve().parent):
        yield partial(open_source, str(place))


def _originals(source: Checkpoint) -> Iterator[Callable[[], Checkpoint]]:
    """What the run that made a checkpoint began with: as it was typed, then by its name."""
    base = source.manifest.base_model.get("id")
    with suppress(CompressError):
        begun = load_profile(source.path.resolve().parent / "profile.yaml")
        named = str(begun.model)
        # a folder that is gone may look like the name of a model on the hub
        if named == base or named.startswith("package:") or Path(named).expanduser().is_dir():
            yield partial(open_model, begun)
    if base:
        yield partial(open_source, str(base))
