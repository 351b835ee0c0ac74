"""Word error rate of speech recognition; lower is better, 0 is every word.

    wer = (substitutions + deletions + insertions) / words of the reference

The numerator is the Levenshtein distance between the words that are said and those that are
written, summed over the clips of the held-out split. It may exceed 1. The model writes greedily,
one clip beside the others in a batch, through `prefill` and `decode`, from the tokens its
tokenizer puts before every text; tokens that generation_config.json suppresses are never taken.
Timestamps are no text.

Both texts pass Whisper's basic normalizer first (arXiv 2212.04356): lower case, no punctuation,
nothing in brackets. Its English one, with rules for spelling and numbers, is not used. `normalize:
none` compares words as they stand. Intervals are over clips (interval.py).
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor.engines import Engine
from compressor.engines.generate import greedy_tokens
from compressor.errors import CompressError
from compressor.measure.inputs import documents, fitting_length, heldout
from compressor.measure.interval import estimate
from compressor.model.checkpoint import load_processor, read_task
from compressor.model.sources import read_config
from compressor.options import options
from compressor.training.pairs import IGNORED
from compressor.training.workbench import Batch, Workbench

TASKS = ("speech-seq2seq",)


@options
class Options:
    """How many clips are written down, and how words are compared."""

    rows: int = Field(256, ge=1, description="clips, taken evenly from the split")
    length: int = Field(448, ge=2, description="tokens of a text at most")
    batch: int = Field(8, ge=1, description="clips at a time")
    normalize: Literal["basic", "none"] = Field(
        "basic", description="Whisper's basic normalizer, or words as they stand"
    )


def run(engine: Engine, options: Options, work: Workbench) -> dict[str, float]:
    """Write down held-out clips.

    Returns:
        wer with _low, _high and _n (clips).

    Raises:
        CompressError: the model does not write down speech; no words are held out.
    """
    if read_task(engine.path) not in TASKS:
        raise CompressError(
            f"'{engine.path.name}' does not write down speech, so it has no word error rate",
            "leave out wer; perplexity and accuracy are for models that answer in text",
        )
    length = fitting_length(engine.path, options.length)
    processor = load_processor(engine.path)
    words = _words(options.normalize)
    errors, counts, owners, seen = [], [], [], 0
    for batch in heldout(work, options.rows, options.batch, length):
        said = [_text(processor, ids[ids != IGNORED].tolist()) for ids in batch["labels"]]
        written = [_text(processor, ids) for ids in transcribe(engine, processor, batch, length)]
        pairs = [(words(a), words(b)) for a, b in zip(said, written, strict=True)]
        errors += [distance(a, b) for a, b in pairs]
        counts += [len(a) for a, _ in pairs]
        owners.append(documents(batch, seen))
        seen += len(pairs)
    if not sum(counts):
        raise CompressError("the held-out clips have no words", "give clips with text in --data")
    return estimate(torch.tensor(errors), torch.tensor(counts), torch.cat(owners)).keys("wer")


def transcribe(engine: Engine, processor: Any, batch: Batch, length: int) -> list[list[int]]:
    """Token ids that the model writes for every clip, without its prompt and its end.

    Args:
        engine: of a speech model.
        processor: its tokenizer.
        batch: with input_features [B, bands, frames].
        length: tokens of prompt and text at most.
    """
    prompt, end = _prompt(engine.path, processor), processor.eos_token_id
    ids = torch.tensor([prompt] * len(batch["input_features"]))
    given = {"input_features": batch["input_features"], "decoder_input_ids": ids}
    given["decoder_attention_mask"] = torch.ones_like(ids)
    rules = _generation(engine.path)
    steps: list[Tensor] = []
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for token in greedy_tokens(
        engine,
        given,
        length - len(prompt),
        rules.get("suppress_tokens") or (),
        rules.get("begin_suppress_tokens") or (),
    ):
        steps.append(token)
        ended |= token == end
        if bool(ended.all()):
            break
    rows = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in ids]
    return [row[: row.index(end)] if end in row else row for row in rows]


def distance(reference: Sequence[Any], written: Sequence[Any]) -> int:
    """Levenshtein distance: the fewest substitutions, deletions and insertions."""
    row = list(range(len(written) + 1))
    for i, wanted in enumerate(reference, start=1):
        before, row = row, [i]
        for j, got in enumerate(written, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (wanted != got)))
    return row[-1]


def _prompt(path: Path, processor: Any) -> list[int]:
    """The decoder's start token and what the tokenizer puts before every text."""
    start = read_config(path)["decoder_start_token_id"]
    ends = (start, processor.bos_token_id, processor.eos_token_id)
    before: Iterable[int] = processor("")["input_ids"]
    return [start, *(i for i in before if i not in ends)]


def _generation(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _text(processor: Any, ids: list[int]) -> str:
    return processor.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _words(normalize: str) -> Callable[[str], list[str]]:
    if normalize == "none":
        return str.split
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    plain = BasicTextNormalizer()
    return lambda text: plain(text).split()
