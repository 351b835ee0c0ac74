"""Before anything is computed: whether the data that the stages read is there."""

from collections.abc import Iterator

from compressor.distill.predictions import unlabelled
from compressor.errors import CompressError
from compressor.model.model import CLASSIFIERS
from compressor.model.shapes import config_of
from compressor.model.sources import read_config
from compressor.prune.scores import ScoreOptions
from compressor.run.methods import WITHOUT_DATA
from compressor.run.profile import Stage
from compressor.run.setting import Setting
from compressor.training.calibrated import SequenceOptions


def refuse_missing_data(setting: Setting) -> None:
    """Refuse a stage, of a baseline too, that reads data where there is none.

    Raises:
        CompressError: the profile names no data, or no tokenizer is there to read it with.
    """
    for stage in _stages(setting):
        without = stage.kind == "export" or stage.method in WITHOUT_DATA
        if not without and getattr(stage.options, "scores", None) is None:
            setting.refuse_unreadable(stage.method)


def refuse_unlabelled(setting: Setting) -> None:
    """Refuse a stage, of a baseline too, that learns from labels where no document has one.

    Raises:
        CompressError: names the stage's remedy.
    """
    if setting.corpus is None or setting.task not in CLASSIFIERS:
        return
    known = setting.corpus.documents["train"]
    if not known or any(document.label is not None for document in known):
        return
    for stage in _stages(setting):
        plain = stage.method == "distill.ce"
        if plain or getattr(stage.options, "ce", 0):
            raise unlabelled(setting.task, "" if plain else f", or write ce: 0 for {stage.method}")


def check_calibration(setting: Setting) -> None:
    """Say where there are fewer calibration sequences than a pruning stage asks for.

    Raises:
        CompressError: there is not one.
    """
    config = config_of(read_config(setting.source.path))
    for stage in _stages(setting):
        options = stage.options
        if isinstance(options, SequenceOptions) and options.reads_data:
            length = options.tokens(config)
        elif isinstance(options, ScoreOptions) and getattr(options, "scores", None) is None:
            length = options.length
        else:
            continue
        if setting.corpus is None or not setting.readable:
            continue
        rows = setting.corpus.rows("calibration", setting.processor, length, setting.reading)
        if len(rows) == 0:
            raise CompressError(
                f"{stage.method} reads calibration sequences of {length} tokens, and the data "
                "holds not one",
                "give more text with --data, name some under data.calibration, or lower length",
            )
        if len(rows) < options.samples:
            said = (
                f"calibration has {len(rows):,} of the {options.samples:,} sequences asked for: "
                f"give more text or write samples: {len(rows)}"
            )
            setting.screen.say(said)
            setting.log(said)


def refuse_unvalidated(setting: Setting) -> None:
    """Refuse what chooses by validation rows where there is none: searches, and best weights.

    Raises:
        CompressError: there is no data, or the validation split is empty.
    """
    for stage in _stages(setting):
        train = getattr(stage.options, "train", None)
        if stage.kind != "search" and not getattr(train, "validate_every", 0):
            continue
        setting.refuse_unreadable(stage.method)
        assert setting.corpus is not None and train is not None
        known = setting.corpus.documents["validation"]
        if not known or not len(
            setting.corpus.rows("validation", setting.processor, train.length, setting.reading)
        ):
            what = (
                "candidates cannot be ranked"
                if stage.kind == "search"
                else f"validate_every of {stage.method} has nothing to look at"
            )
            raise CompressError(
                f"the validation split has no rows, so {what}",
                "give more documents with --data, or name some under data.validation",
            )


def _stages(setting: Setting) -> Iterator[Stage]:
    yield from setting.profile.stages
    for stages in setting.profile.baselines.values():
        yield from stages
