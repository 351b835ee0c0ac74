"""Sentences of novels without capitals and marks, for a T5 trained from scratch, by character.

The source is a sentence in small letters without marks, the target the sentence itself.
"""

import json
import re
import string
import tempfile
from functools import cache
from pathlib import Path

import torch
from cells import DATA
from tokenizers import Tokenizer, decoders, models, processors
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from compressor.model.checkpoint import save
from compressor.model.families import find_family
from compressor.model.model import Model
from compressor.training.data import DataSpec, load_corpus

TITLE = "A small T5 on capitals and punctuation"
TASK, KIND = "seq2seq-lm", "pairs"
BATCH, LENGTH, RATES = 32, 64, (1e-3, 3e-3, 1e-2)
TEACHER_STEPS, TEACHER_RATES = 3000, (3e-3,)
LOSS = "nats per character"
_SENTENCES, _LONGEST = 12000, 48
_CHARACTERS = string.ascii_letters + string.digits + " .,;:!?'\"-"


@cache
def corpus():
    """Pairs, split by sentence."""
    text = " ".join((DATA / "data" / "novels.txt").read_text(encoding="utf-8").split())
    found = dict.fromkeys(re.findall(r"[A-Z][^.!?]{14,46}[.!?]", text))
    fitting = [s for s in found if len(s) <= _LONGEST and set(s) <= set(_CHARACTERS)][:_SENTENCES]
    pairs = [{"source": _plain(s), "target": s} for s in fitting]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "sentences.jsonl")
        file.write_text("\n".join(json.dumps(pair) for pair in pairs), encoding="utf-8")
        return load_corpus(DataSpec(train=[str(file)]), TASK, KIND)


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
        **{"d_model": 128, "d_kv": 32, "d_ff": 512, "num_heads": 4, "num_layers": 3},
        **{"vocab_size": len(processor), "pad_token_id": 0, "eos_token_id": 1},
        **{"decoder_start_token_id": 0, "dropout_rate": 0.0},
    )
    return Model(T5ForConditionalGeneration(config).eval(), find_family("t5"), processor)


@cache
def parent():
    """A directory with the tokenizer, whose side files a saved model takes along."""
    folder = Path(tempfile.mkdtemp())
    model = start()
    model.processor.save_pretrained(folder)
    save(model, folder, folder)
    return folder


def _logits(model, documents):
    """(logits [N, T, V], answers [N, T] with -100 at padding)."""
    read = {"padding": True, "return_tensors": "pt"}
    batch = model.processor([d.text for d in documents], **read)
    answers = model.processor([d.target for d in documents], **read).input_ids
    answers = answers.masked_fill(answers == 0, -100)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    return model.module(**inputs, labels=answers).logits, answers


@torch.no_grad()
def losses(model, split):
    """For every sentence of a split: (nats of its characters, how many)."""
    found = []
    documents = corpus().documents[split][:600]
    for first in range(0, len(documents), 50):
        logits, answers = _logits(model, documents[first : first + 50])
        nats = cross_entropy(logits.transpose(1, 2), answers, reduction="none").sum(1)
        found += zip(nats.tolist(), (answers != -100).sum(1).tolist(), strict=True)
    return found


@torch.no_grad()
def more(model):
    """Share of held-out sentences that are right in every character, given the ones before."""
    right = total = 0
    documents = corpus().documents["heldout"][:600]
    for first in range(0, len(documents), 50):
        logits, answers = _logits(model, documents[first : first + 50])
        right += int(((logits.argmax(-1) == answers) | (answers == -100)).all(1).sum())
        total += len(answers)
    return {"accuracy": right / total}
