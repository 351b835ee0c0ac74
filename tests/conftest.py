"""Tiny random models with real tokenizers, a hand-made workbench and the shared real data."""

import gc
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
from families import VOCABULARY, roughen

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


def pytest_collection_finish():
    """Take what was imported out of every later collection: a run collects before each stage."""
    gc.collect()
    gc.freeze()


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


def _candidate(name, size, p50, cosine):
    return {
        "name": name,
        "path": f"/home/someone/private/{name}",
        "engine": "torch" if "torch" in name else "onnxruntime",
        "parameters": 22_713_216,
        "bytes": size,
        "peak_memory_bytes": 5 * size,
        "latency_ms": {"p50": p50, "p95": p50 * 1.2, "rounds": [p50, p50 * 1.02, p50 * 0.98]},
        "throughput": {"unit": "sentences/s", "value": 2000 / p50},
        "quality": {"cosine": {"value": cosine, "low": cosine - 0.01, "high": cosine, "n": 512}},
        "ratio": {"latency": p50 / 30, "bytes": size / 90e6, "peak_memory": size / 90e6},
    }


@pytest.fixture
def sample_report():
    """A report of a run with two stages, three candidates and one artefact, all made up."""
    scores = [0.9, 0.1, 0.4]
    decisive = {"blocks": "layer", "ranking": "block_influence", "window": 1, "scores": scores}
    importance = {
        "depth": [decisive],
        "layers": scores,
        "heads": [[0.1, 0.2], [0.3, 0.4], [0.5, 0.0]],
        "neurons": [[0.0, 0.5, 1.0]] * 3,
    }
    need = {"parameters": 17_000_000, "bytes": 68_000_000, "peak_memory_bytes": 900_000_000}
    planned = {"seconds": 20.0, "peak_memory_bytes": 1e9, "disk_bytes": 7e7}
    prune = {"importance": importance, "kept_layers": [0, 2]}
    distill = {"loss": [[i, 1.0 / i] for i in range(1, 301)], "training": {"steps": 300}}
    distill["validation"] = {"before": 3.14159, "after": 0.25, "loss": 0.25, "rows": 512}
    return {
        "name": "sample",
        "description": "half of an encoder",
        "profile": "name: sample\nmodel: /home/someone/private/encoder\nstages:\n- export.onnx\n",
        "model": {
            "id": "sample/encoder",
            "family": "bert",
            "parameters": 22_713_216,
            "embedding_parameters": 12_000_000,
        },
        "machine": {"cpu": "made-up", "threads": 2, "memory_bytes": 16_000_000_000},
        "packages": {"python": "3.11", "torch": "2.13.0"},
        "seed": 0,
        "seconds": 352.0,
        "stages": [
            {"name": "01-prune.minitron", "method": "prune.minitron", "seconds": 14.2}
            | {"planned": planned, "notes": prune, **need},
            {"name": "02-distill.latent", "method": "distill.latent", "seconds": 301.0}
            | {"planned": planned, "notes": distill, **need},
        ],
        "bench": {
            "version": 1,
            "machine": {},
            "threads": 1,
            "rounds": 7,
            "noisy": False,
            "candidates": [
                _candidate("original, torch", 90_900_000, 31.2, 1.0),
                _candidate("original, onnx float32", 90_500_000, 24.8, 1.0),
                _candidate("ours, onnx", 18_100_000, 6.3, 0.953),
            ],
        },
        "gates": [
            {
                "name": "03-export.onnx",
                "agreement": {"sentence_embedding": 2.1e-06},
                "tolerance": 0.01,
                "fidelity": {"cosine": 0.953},
                "ok": True,
            }
        ],
        "artifacts": [
            {"name": "03-export.onnx", "engine": "onnxruntime", "usage": "one\ntwo\nprint(DIR)"}
        ],
        "domain": "Held-out documents of the same domain as the training text.",
    }
