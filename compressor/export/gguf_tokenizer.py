"""A tokenizer in the words of llama.cpp, or the reason why it has none for it.

    llama   SentencePiece-like BPE with byte tokens: what merges first scores highest
    gpt2    byte-level BPE; how text is cut before merging has a name (`tokenizer.ggml.pre`)
    bert    WordPiece: a word's first piece gets the sign of a space, others lose their ##

llama.cpp has these algorithms of its own, so the file names one and lists tokens. A tokenizer that
is none of them is refused: it would cut texts differently without a word.
"""

import json
from typing import Any

from compressor.errors import CompressError

# token types of llama.cpp
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# {how text is cut before merging: what llama.cpp calls it}
_CUTS = {
    rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_WORDS}|\p{{N}}{_REST}": "qwen2",
}
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}
NONE = {"tokenizer.ggml.model": "no_vocab"}
WITHOUT = "--set tokenizer=none (in a profile tokenizer: none) writes the model without one"


def vocabulary(processor: Any, size: int) -> dict[str, Any]:
    """{key: value} of a tokenizer for a model of `size` tokens; no_vocab where there is none.

    Raises:
        CompressError: llama.cpp has no such tokenizer, or it has more tokens than the model.
    """
    if processor is None:
        return dict(NONE)
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        raise CompressError("export.gguf reads tokenizers with a tokenizer.json only", WITHOUT)
    spec = json.loads(backend.to_str())
    kind, pre = _kind(spec)
    tokens, types = _tokens(processor, spec, size)
    found: dict[str, Any] = {"model": kind, "pre": pre, "tokens": tokens, "token_type": types}
    if kind == "llama":
        found["scores"] = _scores(spec, tokens)
        found["add_space_prefix"] = _prepends(spec)
    if kind == "gpt2":
        found["merges"] = [" ".join(pair) for pair in _merges(spec)]
        found["add_space_prefix"] = False
    if kind == "bert":
        found["tokens"] = [_phantom(*pair) for pair in zip(tokens, types, strict=True)]
        lower = bool((spec.get("normalizer") or {}).get("lowercase"))
        found["normalizer.lowercase"] = lower
    found |= _special(processor)
    named = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    template = getattr(processor, "chat_template", None)
    return named | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _kind(spec: dict[str, Any]) -> tuple[str, str]:
    """(tokenizer.ggml.model, tokenizer.ggml.pre)."""
    model, cut = spec["model"], spec.get("pre_tokenizer")
    change = spec.get("normalizer") or {}
    pieces = model["type"] == "WordPiece" and model["continuing_subword_prefix"] == "##"
    if pieces and change.get("strip_accents") in (None, bool(change.get("lowercase"))):
        return "bert", "default"
    if model["type"] == "BPE" and model.get("byte_fallback") and _spaces(spec):
        return "llama", "default"
    if model["type"] == "BPE" and not model.get("byte_fallback") and model["merges"]:
        steps = (cut or {}).get("pretokenizers", [cut])
        last = steps[-1] or {}
        if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
            if len(steps) == 1 and last.get("use_regex", True) and not change:
                return "gpt2", "gpt-2"
            name = _CUTS.get(_pattern(steps[0]))
            if change and (name, change["type"]) != ("qwen2", "NFC"):  # it changes no text
                name = None
            if len(steps) == 2 and name and not last.get("use_regex", True):
                return "gpt2", name
    raise CompressError(
        f"llama.cpp has no tokenizer that cuts text as this one does ({model['type']} after "
        f"{(cut or {}).get('type', 'nothing')})",
        WITHOUT,
    )


def _pattern(step: dict[str, Any]) -> str:
    pattern = step.get("pattern", {})
    return pattern.get("Regex", "") if isinstance(pattern, dict) else ""


def _steps(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The normalizers and pre-tokenizers, one after the other."""
    found = []
    for key, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        part = spec.get(key)
        found += part.get(inner, [part]) if part else []
    return found


def _spaces(spec: dict[str, Any]) -> bool:
    """Whether spaces become the sign that SentencePiece has for them."""
    return any(
        (step["type"] == "Replace" and step["content"] == _SPACE)
        or (step["type"] == "Metaspace" and step.get("replacement", _SPACE) == _SPACE)
        for step in _steps(spec)
    )


def _prepends(spec: dict[str, Any]) -> bool:
    """Whether a text gets a space in front."""
    return any(
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in _steps(spec)
    )


def _tokens(processor: Any, spec: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every token of the model; ids that no token has are unused."""
    names = {number: token for token, number in processor.get_vocab().items()}
    if max(names) >= size:
        raise CompressError(
            f"the tokenizer has {max(names) + 1:,} tokens and the model {size:,}", WITHOUT
        )
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    unknown = processor.unk_token_id
    fallback = bool(spec["model"].get("byte_fallback"))
    types = []
    for number in range(size):
        name = names.get(number)
        if name is None:
            types.append(UNUSED)
        elif number == unknown:
            types.append(UNKNOWN if spec["model"]["type"] != "WordPiece" else CONTROL)
        elif number in added:
            types.append(CONTROL if added[number]["special"] else USER_DEFINED)
        else:
            types.append(BYTE if fallback and _is_byte(name) else NORMAL)
    return [names.get(number, f"[PAD{number}]") for number in range(size)], types


def _is_byte(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


def _merges(spec: dict[str, Any]) -> list[list[str]]:
    given = spec["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in given]


def _scores(spec: dict[str, Any], tokens: list[str]) -> list[float]:
    """Minus the number of the first merge that makes a token: SentencePiece merges the best."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(spec)):
        ranks.setdefault(left + right, rank)
    lowest = -float(len(ranks))
    return [-float(ranks[token]) if token in ranks else lowest for token in tokens]


def _phantom(token: str, kind: int) -> str:
    """WordPiece as llama.cpp writes it: a sign before what begins a word."""
    if kind in (CONTROL, UNUSED):
        return token
    return token[2:] if token.startswith("##") else _SPACE + token


def _special(processor: Any) -> dict[str, Any]:
    """Ids of special tokens, and which of them a text gets by itself."""
    ids = {kind: getattr(processor, f"{kind}_token_id", None) for kind in _SPECIAL}
    found: dict[str, Any] = {
        f"{name}_token_id": ids[kind] for kind, name in _SPECIAL.items() if ids[kind] is not None
    }
    first, last = ids["bos"], ids["eos"]
    if processor.cls_token_id is not None and processor.sep_token_id is not None:
        first, last = processor.cls_token_id, processor.sep_token_id
        found |= {"bos_token_id": first, "seperator_token_id": last}  # spelt so in the format
    text = processor("a")["input_ids"]
    found["add_bos_token"] = first is not None and len(text) > 1 and text[0] == first
    found["add_eos_token"] = last is not None and len(text) > 1 and text[-1] == last
    return found
