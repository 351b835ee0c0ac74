"""The files that belong to a model beside its weights and config.json, by name.

A list of names, not of suffixes: notes, training states and data that a user keeps in the same
folder are nobody else's business.
"""

import shutil
from pathlib import Path

SIDE_FILES = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    "normalizer.json",
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "vocab.txt", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("*_Pooling/config.json", "*_Normalize/config.json"),
)


def side_files(directory: Path) -> list[Path]:
    """The side files that a directory has, sorted."""
    found = {file for pattern in SIDE_FILES for file in directory.glob(pattern)}
    return sorted(file for file in found if file.is_file())


def copy_side_files(parent: Path, directory: Path) -> None:
    """Copy tokenizer, pooling and generation files; never code, weights, manifests or notes."""
    for file in side_files(parent):
        target = directory / file.relative_to(parent)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
