"""What every method that trains shares: batches, what trains, the teacher's outputs, the loop."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from compressor.distill.predictions import passing_through
from compressor.errors import CompressError
from compressor.model.forward import accepted, without_cache
from compressor.model.model import Model
from compressor.model.sparse import zeros_held
from compressor.training import metrics
from compressor.training.loop import train
from compressor.training.options import Train
from compressor.training.parallel import team
from compressor.training.reading import most_tokens
from compressor.training.teacher import AsksTeacher, with_outputs
from compressor.training.validation import validation_batches, validation_loss
from compressor.training.workbench import Workbench

_INPUTS = ("image_size", "num_channels", "num_mel_bins", "max_source_positions")


class TrainedOptions(Protocol):
    """What the options of every method that trains have."""

    @property
    def train(self) -> Train: ...

    @property
    def freeze_embeddings(self) -> bool: ...


def run(
    model: Model,
    objective: nn.Module,
    options: TrainedOptions,
    work: Workbench,
    optimizer: Optimizer | None = None,
    after_step: Callable[[int], None] | None = None,
    weights: bool = True,
) -> dict:
    """Train `model` in place on the train split; notes get the loss curve and the facts.

    Weights that a pattern of `model.formats` says are zero stay zero.

    Where the validation split has rows, they also get what the objective says of them before and
    after: notes["validation"] = {before, after, parts, rows}. A search compares `after`; `parts`
    are those of the trained model.

    Args:
        objective: see training/loop.py; one that asks a teacher may have it asked beforehand
            (training/teacher.py).
        optimizer: see training/loop.py; AdamW when None.
        after_step: called with the number of finished steps.
        weights: whether the model's own weights train; else only what the objective learns.

    Returns:
        {steps, tokens, seconds, loss, precision}; see training/loop.py.

    Raises:
        CompressError: rows longer than the model takes, too little text, or a loss that is not
            finite.
    """
    wanted = options.train
    _refuse_long_rows(model, wanted.length)
    batches = work.batches(
        "train", wanted.steps * wanted.accumulate, batch=wanted.batch, length=wanted.length
    )
    _choose_weights(model, options.freeze_embeddings, weights)
    if isinstance(objective, AsksTeacher) and objective.cache_teacher:
        batches = with_outputs(batches, objective, work.teacher.module, work)
    elif isinstance(objective, AsksTeacher):
        work.log("the teacher is asked at every step")
    kept = validation_batches(wanted, work) if team().leads else []
    if team().leads and wanted.validate_every and not kept:
        raise CompressError(
            "train.validate_every asks for validation rows, and the data holds not one",
            "give more documents with --data, name some under data.validation, or leave it out",
        )
    model.module.eval()
    before = validation_loss(objective, kept, work) if kept else None

    def look() -> float:
        return team().from_leader(validation_loss(objective, kept, work).loss if kept else 0.0)

    with zeros_held(model):
        facts = train(
            *(model, batches, objective, wanted, work, optimizer, after_step),
            identity=str(options),
            look=look,
        )
    note_curves(model, wanted, work)
    model.notes["training"] = facts
    team().meet()  # after this nobody else needs the scratch
    work.log(f"training: {facts}")
    if before is not None:
        after = validation_loss(objective, kept, work)
        losses = {"before": before.loss, "after": after.loss}
        model.notes["validation"] = losses | {"parts": after.parts, "rows": after.rows}
        work.log(f"validation: {model.notes['validation']}")
    return facts


def note_curves(model: Model, options: Train, work: Workbench) -> None:
    """Note the curves in the metrics of a scratch."""
    model.notes["loss"] = metrics.loss_curve(work.scratch)
    if options.validate_every:
        model.notes["validation_loss"] = metrics.curve(work.scratch, "validation")


def _refuse_long_rows(model: Model, length: int) -> None:
    most = most_tokens(model.config)
    if most is not None and length > most:
        raise CompressError(
            f"train.length is {length} and the model takes at most {most} tokens",
            f"train.length: {most}",
        )


def _choose_weights(model: Model, freeze_embeddings: bool, weights: bool) -> None:
    model.module.requires_grad_(weights)
    frozen = model.family.embeddings if freeze_embeddings else ()
    for name in (*model.family.fixed, *frozen):
        model.base.get_submodule(name).requires_grad_(False)


def refuse_other_vocabulary(student: Model, teacher: Model) -> None:
    """Both must read the same ids, sounds or pixels.

    Raises:
        CompressError: the tokenizers, their tables, or the sizes of images or features, differ.
    """
    for key in _INPUTS:
        own, other = (getattr(model.config, key, None) for model in (student, teacher))
        if own != other:
            raise CompressError(
                f"the teacher has {key} {other} and the student {own}",
                "choose a teacher that reads the same, e.g. teacher: input",
            )
    mine, theirs = student.sizes["vocabulary"], teacher.sizes["vocabulary"]
    tables = [m.processor.get_vocab() for m in (student, teacher) if m.processor is not None]
    known = len(tables) == 2 and mine > 0  # a model of images reads no tokens
    hint = "choose a teacher with the same tokenizer, e.g. teacher: input"
    if known and tables[0] == tables[1] and mine != theirs and min(mine, theirs) >= len(tables[0]):
        raise CompressError(
            f"teacher and student share a tokenizer of {len(tables[0])} tokens, but the teacher's "
            f"table has {theirs} rows and the student's {mine}: one of them is padded",
            "give both tables the same number of rows, or take teacher: input",
        )
    if mine != theirs:
        raise CompressError(
            f"the teacher has a vocabulary of {theirs} tokens and the student one of {mine}", hint
        )
    if known and tables[0] != tables[1]:
        raise CompressError(f"the teacher has another tokenizer: {_difference(*tables)}", hint)


def _difference(mine: dict[str, int], theirs: dict[str, int]) -> str:
    """The first number that two vocabularies give to different tokens, in a few words."""
    number = min(number for _, number in mine.items() ^ theirs.items())
    own, other = ({i: token for token, i in t.items()}.get(number) for t in (mine, theirs))
    return f"its token {number} is {other!r}, the student's {own!r}"


def backbone(model: Model, batch: dict, **extra: Any) -> Any:
    """Forward pass without task head and cache; the output of transformers.

    The states of a model that is its own backbone (T5) stand where its logits would.
    """
    inputs = accepted(model, batch) | without_cache(model) | extra
    if model.base is not model.module:
        return model.base(**inputs)
    head = model.module.get_output_embeddings()  # type: ignore[operator]
    with passing_through(head) if head is not None else nullcontext():  # T5 is its own backbone
        return model.module(**inputs)
