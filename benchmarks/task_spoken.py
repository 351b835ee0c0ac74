"""Numbers from 1 to 999 spoken by a machine, for a Whisper trained from scratch, by word.

The speech is synthetic: eSpeak NG (formants, no recorded voice) says every number a few times, in
voices, speeds and pitches drawn by chance. Nobody's speech sounds like this, and a model that
learned it understands nobody; what is compared is how losses recover one and the same model. The
numbers of validation and held-out clips are said nowhere in the others. The model is small, hears
clips of up to 2 seconds, and has random weights before the teacher is trained. `trivial` is the
accuracy of answering every clip with the most frequent answer, which hears nothing.

Rates are chosen at 75 %, where cross entropy prefers 1e-3 and SquareHead 3e-3. At 90 % the rate is
the whole difference: cross entropy at 3e-3 (in the cells, not in the table) is as good there.
"""

import ctypes
import random
from collections import Counter
from functools import cache
from typing import Any

import answers
import lab
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from compressor.errors import CompressError
from compressor.model.families import find_family
from compressor.model.model import Model
from compressor.training.audio import audio_plan, resample
from compressor.training.data import DataSpec, load_corpus
from compressor.training.reading import Reading

TITLE = "A small Whisper on synthetic spoken numbers"
TASK = "speech-seq2seq"
BATCH, LENGTH, RATES = 16, 8, (3e-4, 1e-3, 3e-3)
TEACHER_STEPS, TEACHER_RATES = 600, (1e-3,)
LOSS = "nats per word"
_RATE, _TIMES, _SCORED = 16000, 4, 300  # Hz; clips of a number; clips of a split
_HELDOUT, _VALIDATION = 75, 50  # numbers
_VOICES = [f"en-us+{voice}" for voice in ("m1", "m3", "m4", "m7", "f1", "f2", "f4", "f5")]
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_CONFIG: dict[str, Any] = {
    **{"d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 80},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "vocab_size": 33},
    **{"max_source_positions": 100, "max_target_positions": 16, "decoder_start_token_id": 3},
    **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3},
    **{"suppress_tokens": None, "begin_suppress_tokens": None},
    "init_std": 0.08,  # 0.02 is for widths of a thousand: sound would be lost beside the positions
}
READING = Reading("audio", start=3, audio=audio_plan(WhisperConfig(**_CONFIG), {}))


def words(number):
    """A number from 1 to 999 as it is said."""
    hundreds, rest = divmod(number, 100)
    said = [_SMALL[hundreds], "hundred"] if hundreds else []
    if hundreds and rest:
        said.append("and")
    if rest >= 20:
        said.append(_TENS[rest // 10 - 2])
        rest %= 10
    return " ".join([*said, _SMALL[rest]] if rest else said)


def _synthesiser():
    """A function (text, voice, words per minute, pitch) -> samples [T] in -1 ... 1 at _RATE."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise CompressError(
            "synthetic speech needs eSpeak NG", "pip install espeakng-loader"
        ) from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    synchronous, utf8, speed_is, pitch_is = 2, 1, 1, 3  # of speak_lib.h
    rate = library.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0)
    heard = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def hear(samples, count, events):
        if samples and count:
            heard.append(np.ctypeslib.as_array(samples, (count,)) / 2**15)
        return 0

    def say(text, voice, speed, pitch):
        library.espeak_SetSynthCallback(hear)
        if library.espeak_SetVoiceByName(voice.encode()):
            raise CompressError(f"eSpeak NG has no voice {voice}", "pip install -U espeakng-loader")
        library.espeak_SetParameter(speed_is, speed, 0)
        library.espeak_SetParameter(pitch_is, pitch, 0)
        spoken = text.encode()
        size = ctypes.c_size_t(len(spoken) + 1)
        library.espeak_Synth(spoken, size, 0, 0, 0, utf8, None, None)
        x_T = resample(np.concatenate(heard), rate, _RATE)
        heard.clear()
        return x_T

    return say


@cache
def corpus():
    """Clips and their words, split by number; the clips are kept in the temporary folder."""
    folder = lab.kept("spoken", _speak)
    tables = {split: [str(folder / f"{split}.csv")] for split in ("train", "validation", "heldout")}
    return load_corpus(DataSpec(**tables), TASK, READING.kind)


def _speak(folder):
    """Write the clips, and a table for every split."""
    import soundfile

    draw, say = random.Random(0), _synthesiser()
    numbers = draw.sample(range(1, 1000), 999)
    for place, number in enumerate(numbers):
        early = "validation" if place < _HELDOUT + _VALIDATION else "train"
        split = "heldout" if place < _HELDOUT else early
        table = folder / f"{split}.csv"
        lines = [] if table.is_file() else ["audio,text"]
        for time in range(_TIMES):
            x_T = say(
                words(number), draw.choice(_VOICES), draw.randint(200, 300), draw.randint(30, 70)
            )
            soundfile.write(folder / f"{number}-{time}.wav", x_T, _RATE)
            lines.append(f"{number}-{time}.wav,{words(number)}")
        with table.open("a", encoding="utf-8") as stream:
            stream.write("\n".join(lines) + "\n")


def _tokenizer():
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    vocabulary = [*special, *_SMALL[1:], *_TENS, "hundred", "and"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocab=ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names)


def start():
    """The model before any training, of random weights."""
    torch.manual_seed(0)
    module = WhisperForConditionalGeneration(WhisperConfig(**_CONFIG)).eval()
    return Model(module, find_family("whisper"), _tokenizer())


@cache
def parent():
    """A directory with the tokenizer, which a saved model takes along."""
    return answers.beside(_tokenizer())


def losses(model, split):
    """For every clip of a split: (nats of its words, how many)."""
    return answers.losses(model, corpus(), split, _SCORED, LENGTH, READING)


def more(model):
    """Share of held-out clips whose words greedy decoding finds, and of the most frequent words."""
    said = Counter(d.target for d in corpus().documents["heldout"])
    right = answers.accuracy(model, corpus(), "heldout", _SCORED, LENGTH, READING)
    return {"accuracy": right, "trivial": said.most_common(1)[0][1] / said.total()}
