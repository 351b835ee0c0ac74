"""Pieces of novels without capitals and marks, for a T5 trained from scratch, by character.

A piece goes from a capital to the mark that ends its sentence: a short sentence, or the end of a
longer one. The source has it in small letters without marks, the target as it was printed. The
model is small and has random weights before the teacher is trained. `trivial` is the accuracy of
making the first letter a capital and setting a full stop, which needs no model. The model starts
from less: copying letters is most of what it has to learn, as a T5's decoder is told no positions
of the source, and where it errs it mostly errs in copying. A teacher that is as often right as the
trivial rule is right elsewhere: also in pieces with names, commas and questions.

Rates end at 3e-3: at 75 % 1e-2 is better for every loss, but it ruins a model that lost less.
"""

import json
import re
import string
import tempfile
from functools import cache
from pathlib import Path

import answers
import torch
from cells import DATA
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from compressor.model.families import find_family
from compressor.model.model import Model
from compressor.training.data import DataSpec, load_corpus
from compressor.training.reading import Reading

TITLE = "A small T5 on capitals and punctuation"
TASK, READING = "seq2seq-lm", Reading("pairs", start=0)
BATCH, LENGTH, RATES = 32, 36, (3e-4, 1e-3, 3e-3)
TEACHER_STEPS, TEACHER_RATES = 2000, (1e-3,)
LOSS = "nats per character"
_SCORED = 600  # pieces of a split
_CHARACTERS = string.ascii_letters + string.digits + " .,;:!?'\"-"


@cache
def corpus():
    """Pairs, split by source."""
    text = " ".join((DATA / "data" / "novels.txt").read_text(encoding="utf-8").split())
    found = dict.fromkeys(re.findall(r"\b[A-Z][^.!?]{11,30}[.!?]", text))
    pairs = [{"source": _plain(s), "target": s} for s in found if set(s) <= set(_CHARACTERS)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pieces.jsonl")
        file.write_text("\n".join(json.dumps(pair) for pair in pairs), encoding="utf-8")
        return load_corpus(DataSpec(train=[str(file)]), TASK, READING.kind)


def _plain(sentence):
    return "".join(c for c in sentence.lower() if c.isalnum() or c == " ")


def _tokenizer():
    special = ["<pad>", "</s>", "<unk>"]
    ids = {token: i for i, token in enumerate([*special, *_CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def start():
    """The model before any training, of random weights."""
    torch.manual_seed(0)
    processor = _tokenizer()
    config = T5Config(
        **{"d_model": 128, "d_kv": 32, "d_ff": 512, "num_heads": 4, "num_layers": 2},
        **{"vocab_size": len(processor), "pad_token_id": 0, "eos_token_id": 1},
        **{"decoder_start_token_id": READING.start, "dropout_rate": 0.0},
    )
    return Model(T5ForConditionalGeneration(config).eval(), find_family("t5"), processor)


@cache
def parent():
    """A directory with the tokenizer, which a saved model takes along."""
    return answers.beside(_tokenizer())


def losses(model, split):
    """For every piece of a split: (nats of its characters, how many)."""
    return answers.losses(model, corpus(), split, _SCORED, LENGTH, READING)


def more(model):
    """Share of held-out pieces that greedy decoding restores, and of those that are trivial."""
    plain = corpus().documents["heldout"][:_SCORED]
    trivial = sum(d.target == f"{d.text[:1].upper()}{d.text[1:]}." for d in plain) / len(plain)
    right = answers.accuracy(model, corpus(), "heldout", _SCORED, LENGTH, READING)
    return {"accuracy": right, "trivial": trivial}
