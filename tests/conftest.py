"""Tiny random models with real tokenizers, a hand-made workbench and the shared real data."""

import hashlib
import os
import string
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from compressor.model.families import find_family
from compressor.model.model import Model
from compressor.screen import Silent
from compressor.training.workbench import Workbench

VOCABULARY = 96
BERT_CLASSES = {
    None: BertModel,
    "sequence-classification": BertForSequenceClassification,
    "masked-lm": BertForMaskedLM,
}
ROOT = Path(__file__).resolve().parent.parent
SHARED = (
    "checkpoints/novels-llama/model.safetensors",
    "checkpoints/stories260K/model.safetensors",
    "data/novels.txt",
    "data/tinystories.txt",
    "data/stsb-en-dev.csv",
)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: tests share two cores, and sums keep their order."""
    torch.set_num_threads(1)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, 96 in all, <s> in front: the llama tokenizer in miniature."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    characters = string.ascii_letters + string.digits + " \n" + string.punctuation
    vocabulary = [*special, *characters][:VOCABULARY]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=128,
    )


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over single letters, 96 tokens, [CLS] ... [SEP]: BERT's in miniature."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.ascii_lowercase + string.digits
    vocabulary = [*special, *letters, *(f"##{c}" for c in letters), *string.punctuation]
    ids = {token: i for i, token in enumerate(vocabulary[:VOCABULARY])}
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


def roughen(module: torch.nn.Module) -> None:
    """Move biases and norm weights off 0 and 1, so that no test passes because they are trivial."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            noise = torch.randn_like(parameter) * 0.1
            parameter.data.add_(noise if name.endswith("bias") else noise.abs())


@pytest.fixture
def pico_llama():
    """Factory: `pico_llama(seed=0, **config overrides)` gives a float32 LlamaForCausalLM Model."""

    def build(seed=0, **overrides):
        settings = {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
        }
        torch.manual_seed(seed)
        module = LlamaForCausalLM(LlamaConfig(**settings | overrides)).eval()
        roughen(module)
        return Model(module, find_family("llama"), character_tokenizer())

    return build


@pytest.fixture
def pico_bert():
    """Factory: `pico_bert(head=None, pooling=None, seed=0, **config overrides)` gives a Model.

    `head`: None | "sequence-classification" | "masked-lm".
    """

    def build(head=None, pooling=None, seed=0, **overrides):
        settings = {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "pad_token_id": 0,
        }
        torch.manual_seed(seed)
        module = BERT_CLASSES[head](BertConfig(**settings | overrides)).eval()
        roughen(module)
        return Model(module, find_family("bert"), letter_tokenizer(), pooling=pooling)

    return build


def random_batch(name, index, batch, length, vocabulary):
    """Random ids, a pure function of (name, index); row r has r % 4 padded places at its end."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {index}".encode()).digest()[:4], "little")
    ids = torch.randint(
        5, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed)
    )
    real = length - torch.arange(batch) % min(4, length)
    mask = (torch.arange(length)[None] < real[:, None]).long()
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask < 1, -100),
    }


@pytest.fixture
def make_work(tmp_path):
    """Factory of a Workbench over random ids: `make_work(teacher=None, reference=None, ...)`.

    `length` caps what a method asks for, so that pico models can take it; `log` collects lines.
    """

    def build(
        teacher=None, reference=None, *, seed=0, batch=4, length=16, vocabulary=VOCABULARY, log=None
    ):
        def batches(split, n, **shape):
            rows, tokens = shape.get("batch", batch), min(shape.get("length", length), length)
            count = 4 if n is None else n
            return [
                random_batch(f"{split} {seed}", i, rows, tokens, vocabulary) for i in range(count)
            ]

        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        lines = [] if log is None else log
        return Workbench(
            seed=seed,
            device=torch.device("cpu"),
            scratch=scratch,
            _screen=Silent(),
            _log=lines.append,
            _batches=batches,
            _teacher=lambda: teacher,
            _reference=lambda: reference,
        )

    return build


@pytest.fixture
def shared_data():
    """Path of the folder with real checkpoints and texts; skips where there is no such folder.

    A folder that is there but incomplete fails: a silent skip would hide a broken set-up.
    """
    folder = Path(os.environ.get("COMPRESS_TEST_DATA", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set COMPRESS_TEST_DATA)")
    for name in SHARED:
        assert (folder / name).exists(), f"{folder} is there but {name} is missing"
    return folder
