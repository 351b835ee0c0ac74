"""Clips of speech: where they lie, and the log-mel features that Whisper reads.

Features are transformers' WhisperFeatureExtractor's, as the checkpoint's preprocessor_config.json
says, or with the model's number of mel bands. Channels are averaged. Another sampling rate than
the model's is changed in the frequency domain: the spectrum of the whole clip is cut off at, or
padded to, the new highest frequency, so nothing folds back.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from compressor.errors import CompressError
from compressor.training.documents import Document, Media
from compressor.training.pairs import decoder_inputs
from compressor.training.preprocessing import damaged
from compressor.training.rows import Rows
from compressor.training.tables import read_records


@dataclass(frozen=True)
class AudioPlan:
    """A feature extractor, and how many frames the model reads of every clip."""

    extractor: Any
    frames: int

    @property
    def samples(self) -> int:
        """Samples of the longest clip."""
        return self.frames * self.extractor.hop_length

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two plans the same."""
        return (self.frames, str(self.extractor.to_dict()))


def audio_plan(config: Any, given: dict[str, Any]) -> AudioPlan:
    """The plan of a model's config and of its preprocessor_config.json ({} without one).

    Raises:
        CompressError: the file is damaged, or asks for other mel bands than the model reads.
    """
    from transformers import WhisperFeatureExtractor

    bands = config.num_mel_bins
    try:
        extractor: Any = WhisperFeatureExtractor.from_dict(given or {"feature_size": bands})
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise damaged(error) from error
    if extractor.feature_size != bands:
        raise CompressError(
            f"preprocessor_config.json makes {extractor.feature_size} mel bands and the model "
            f"reads {bands}",
            f"write feature_size {bands} into preprocessor_config.json",
        )
    return AudioPlan(extractor, 2 * config.max_source_positions)


@dataclass(frozen=True)
class AudioRows:
    """Clips and the tokens of their words; features are computed when a batch asks for them."""

    documents: Sequence[Document]
    answers: Rows
    plan: AudioPlan
    start: int

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Positions of encoder and decoder together, int64 [R]."""
        return self.answers.lengths + self.plan.frames // 2

    def read(self, members: NDArray[np.int64]) -> dict[str, Tensor]:
        """input_features float32 [B, bands, frames] and the keys of `pairs.decoder_inputs`."""
        clips = [_samples(self.documents[i], self.plan) for i in members]
        found = features(clips, self.plan)
        return {"input_features": found} | decoder_inputs(self.answers, members, self.start)


def features(clips: Sequence[NDArray[np.float32]], plan: AudioPlan) -> Tensor:
    """Log-mel features [B, bands, frames] of clips at the model's rate."""
    found = plan.extractor(
        list(clips),
        sampling_rate=plan.extractor.sampling_rate,
        max_length=plan.samples,
        return_tensors="pt",
    )
    return found["input_features"].float()


def resample(x_T: NDArray[np.float64], before: int, after: int) -> NDArray[np.float64]:
    """A clip [T] at another rate, band-limited: [T * after / before]."""
    length = round(len(x_T) * after / before)
    spectrum = np.fft.rfft(x_T)[: length // 2 + 1]
    return np.fft.irfft(spectrum, length) * (length / len(x_T))


def read_clips(path: Path) -> list[Document]:
    """Documents of a table with the columns audio and text; files are relative to the table.

    Raises:
        CompressError: a file is missing or no sound, or soundfile is not installed.
    """
    found = []
    for line, (name, text), _ in read_records(path, [("audio", "text")]):
        file = path.parent / name
        if not file.is_file():
            raise CompressError(
                f"{path.name}:{line}: there is no audio file '{name}'",
                "give paths relative to the folder of the table",
            )
        if text.strip():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            found.append(Document(target=text, media=Media(file, digest)))
    return found


def refuse_bad_clips(documents: Iterable[Document], plan: AudioPlan) -> None:
    """Raise CompressError for a clip that is empty, or longer than the model hears at once."""
    rate = plan.extractor.sampling_rate
    most = plan.samples / rate
    for document in documents:
        assert document.media is not None
        path = document.media.path
        seconds = _sound(path, "info").duration
        if round(seconds * rate) < 1:
            raise _empty(path)
        if seconds > most:
            raise CompressError(
                f"'{path}' is {seconds:.1f} s long and the model hears {most:g} s",
                "cut the clip, and its text, into shorter ones",
            )


def _sound(path: Path, call: str, **given: Any) -> Any:
    """What soundfile's info or read gives."""
    soundfile = _soundfile()
    try:
        return getattr(soundfile, call)(path, **given)
    except soundfile.LibsndfileError as error:
        raise CompressError(f"'{path}' is no sound that can be read", "use wav or flac") from error


def _empty(path: Path) -> CompressError:
    return CompressError(f"'{path}' holds no sound", "remove its line from the table")


def _samples(document: Document, plan: AudioPlan) -> NDArray[np.float32]:
    """Samples [T] of a clip at the model's rate."""
    assert document.media is not None
    path = document.media.path
    x_TC, rate = _sound(path, "read", dtype="float64", always_2d=True)
    if not len(x_TC):  # a damaged file may hold less than its header says
        raise _empty(path)
    x_T, wanted = x_TC.mean(axis=1), plan.extractor.sampling_rate
    return (x_T if rate == wanted else resample(x_T, rate, wanted)).astype(np.float32)


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise CompressError(
            "reading sound needs the package soundfile", "pip install 'compress[audio]'"
        ) from error
    return soundfile
