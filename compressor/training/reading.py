"""What a model reads, as its config and its preprocessing file say; the tokenizer aside."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.errors import CompressError
from compressor.model.shapes import config_of
from compressor.model.sources import read_config
from compressor.training.audio import AudioPlan, audio_plan
from compressor.training.images import ImagePlan, image_plan
from compressor.training.preprocessing import preprocessing_of
from compressor.training.sources import Kind


@dataclass(frozen=True)
class Reading:
    """How documents become inputs.

    Attributes:
        kind: text, pairs, audio or images.
        start: the token a decoder that answers begins with.
        image, audio: preprocessing of images and of clips.
        classes: {name: number} of an image classifier that names its classes, else empty.
    """

    kind: Kind = "text"
    start: int | None = None
    image: ImagePlan | None = None
    audio: AudioPlan | None = None
    classes: dict[str, int] = field(default_factory=dict)

    def positions(self, length: int) -> int:
        """Positions of the longest row, decoder included, when a text has `length` tokens."""
        if self.image is not None:
            return self.image.patches
        if self.audio is not None:
            return self.audio.frames // 2 + length
        return length if self.start is None else 2 * length


TEXT = Reading()


def reading_of(path: Path) -> Reading:
    """The reading of a checkpoint directory.

    Raises:
        CompressError: preprocessing and model do not fit together, or an encoder-decoder names
            no start token.
    """
    config = config_of(read_config(path))
    kind = kind_of(config)
    if kind == "images":
        given = preprocessing_of(path, "image_processor")
        return Reading(kind, image=image_plan(config, given), classes=_classes(config))
    if kind == "text":
        return TEXT
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise CompressError(
            f"config.json of '{path.name}' names no decoder_start_token_id",
            "write the token its decoder starts with into config.json",
        )
    if kind == "pairs":
        return Reading(kind, start)
    return Reading(
        kind, start, audio=audio_plan(config, preprocessing_of(path, "feature_extractor"))
    )


def kind_of(config: Any) -> Kind:
    """What a model reads, by the keys of its config."""
    if hasattr(config, "image_size") and not hasattr(config, "vocab_size"):
        return "images"
    if hasattr(config, "num_mel_bins"):
        return "audio"
    return "pairs" if getattr(config, "is_encoder_decoder", False) else "text"


def _classes(config: Any) -> dict[str, int]:
    """{name: number} where they have other names than transformers' LABEL_0, LABEL_1, ..."""
    named = {name: number for number, name in (config.id2label or {}).items()}
    for classes in (named, config.label2id or {}):
        if any(not re.fullmatch(r"LABEL_\d+", str(name)) for name in classes):
            return {str(name): int(number) for name, number in classes.items()}
    return {}


def most_tokens(config: Any) -> int | None:
    """Tokens of the longest text a model reads or answers with; None where there is no limit."""
    for key in ("max_position_embeddings", "max_target_positions"):
        if (most := getattr(config, key, None)) is not None:
            # RoBERTa numbers its positions from behind the padding id
            return most - config.pad_token_id - 1 if config.model_type == "roberta" else most
    return None
