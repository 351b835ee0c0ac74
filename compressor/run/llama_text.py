"""Whether llama.cpp cuts text into the tokens of our tokenizer."""

from pathlib import Path
from typing import Any

from compressor.engines.llama_cpp import LlamaCppEngine
from compressor.errors import Refused
from compressor.export.gguf_tokenizer import WITHOUT
from compressor.model.checkpoint import load_processor

TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "It's 1984; they'll pay 3,50 for 12 apples (or 100) and don't ask!",
    "Two  spaces, a new\nline,\n\n and words like naïve, 東京, ﬁn and 🙂.",
)


def compare_text(engine: LlamaCppEngine, directory: Path) -> dict[str, Any]:
    """Compare tokens of an open engine with those of the tokenizer beside it.

    Returns:
        tokenized (texts cut alike), where there is a tokenizer.

    Raises:
        Refused: llama.cpp cuts a text into other tokens.
    """
    found: dict[str, Any] = {}
    processor = load_processor(directory)
    if engine.session.has_vocabulary and processor is not None:
        for text in TEXTS:
            ours, theirs = processor(text)["input_ids"], engine.session.tokenize(text, special=True)
            if ours != theirs:
                raise Refused(f"llama.cpp cuts {text!r} into other tokens", WITHOUT)
        found["tokenized"] = len(TEXTS)
    return found
