"""What llama.cpp makes of text: the same tokens as our tokenizer, and the same greedy words?"""

from contextlib import closing
from pathlib import Path
from typing import Any

from compressor.engines.generate import generate
from compressor.engines.gguf import GgufEngine
from compressor.engines.llama_cpp import LlamaCppEngine
from compressor.errors import Refused
from compressor.export.gguf_tokenizer import WITHOUT
from compressor.model.checkpoint import load_processor, read_task
from compressor.model.probe import read_probe

TOKENS = 32
TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "It's 1984; they'll pay 3,50 for 12 apples (or 100) and don't ask!",
    "Two  spaces, a new\nline,\n\n and words like naïve, 東京, ﬁn and 🙂.",
)


def compare_text(engine: LlamaCppEngine, directory: Path) -> dict[str, Any]:
    """Compare tokens and greedy continuations of an open engine with PyTorch's.

    Returns:
        tokenized (texts cut alike), and for decoders greedy {same, of}: how many tokens are the
        same before the first that is not, from the probe's first row.

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
    if read_task(directory) == "causal-lm":
        found["greedy"] = {"same": _same_words(engine, directory), "of": TOKENS}
    return found


def _same_words(engine: LlamaCppEngine, directory: Path) -> int:
    prompt = read_probe(directory)[0][0]["input_ids"][0].tolist()
    with closing(GgufEngine(directory)) as reference:
        ours = generate(reference, prompt, TOKENS)[len(prompt) :]
    theirs = generate(engine, prompt, TOKENS)[len(prompt) :]
    pairs = list(zip(ours, theirs, strict=True))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
