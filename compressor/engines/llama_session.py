"""A GGUF file in llama.cpp, through llama-cpp-python's ctypes functions; numpy, nothing of torch.

One context serves several rows: row b is the sequence b of its key-value cache. Settings are those
a user gets: a cache of float16, flash attention where llama.cpp wants it.
"""

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compressor.engines import install_line
from compressor.errors import CompressError

_ROOM = 256  # tokens that a row may still get before its context must grow
_silent: list[Any] = []  # the log callback, which the library only points to


def bindings() -> Any:
    """The module llama_cpp, with its log turned off.

    Raises:
        CompressError: llama-cpp-python is not installed.
    """
    try:
        llama_cpp = importlib.import_module("llama_cpp")
    except ImportError as error:
        raise CompressError(
            "llama.cpp runs through the package llama-cpp-python", install_line("llama.cpp")
        ) from error
    if not _silent:
        callback = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(callback, None)
        _silent.append(callback)
        llama_cpp.llama_backend_init()
    return llama_cpp


def k_quants(weight: np.ndarray, number: int) -> np.ndarray:
    """Blocks that llama.cpp itself makes of a float32 matrix [O, I]: uint8 [O, bytes of a row].

    Args:
        weight: I is a multiple of the type's block.
        number: of the type in GGUF.

    Raises:
        CompressError: llama-cpp-python is not installed.
    """
    bindings()
    base = importlib.import_module("llama_cpp._ggml").libggml
    size, make = base.ggml_row_size, base.ggml_quantize_chunk
    size.argtypes, size.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_size_t
    pointers = [ctypes.c_void_p, ctypes.c_void_p]
    make.argtypes = [ctypes.c_int, *pointers, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    make.restype = ctypes.c_size_t
    rows, inputs = weight.shape
    found = np.empty((rows, size(number, inputs)), dtype=np.uint8)
    source = np.ascontiguousarray(weight, dtype=np.float32)
    written = make(number, source.ctypes.data, found.ctypes.data, 0, rows, inputs, None)
    assert written == found.nbytes, "llama.cpp filled another number of bytes"
    return found


class Session:
    """A loaded file and one context.

    Args:
        file: the GGUF file.
        threads: threads of a step and of a prompt; None leaves the choice to llama.cpp.
        states: give hidden states of every token instead of logits.

    Raises:
        CompressError: llama-cpp-python is missing, or llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, threads: int | None = None, states: bool = False) -> None:
        self.lib, self.threads, self.states = bindings(), threads, states
        settings = self.lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(str(file).encode(), settings)
        if not self.model:
            raise CompressError(
                f"llama.cpp cannot load '{file.parent.name}/{file.name}'",
                "compress verify names what is wrong with it; or export it again",
            )
        vocab = self.lib.llama_model_get_vocab(self.model)
        width = self.lib.llama_model_n_embd(self.model)
        self.width = width if states else self.lib.llama_vocab_n_tokens(vocab)
        self.vocab, self.context = vocab, None
        self.rows = self.length = 0

    def start(self, rows: int, length: int) -> None:
        """Empty the cache, and make room for rows of `length` tokens."""
        if rows > self.rows or length > self.length or self.context is None:
            self._open(max(rows, self.rows), max(length + _ROOM, self.length))
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def _open(self, rows: int, length: int) -> None:
        if self.context is not None:
            self.lib.llama_free(self.context)
        settings = self.lib.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = rows * length, rows
        settings.n_batch = settings.n_ubatch = length if self.states else min(length, 2048)
        if not self.states:
            settings.n_ubatch = min(length, 512)
        settings.embeddings, settings.pooling_type = self.states, self.lib.LLAMA_POOLING_TYPE_NONE
        if self.threads is not None:
            settings.n_threads = settings.n_threads_batch = self.threads
        self.context = self.lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise CompressError(
                f"llama.cpp makes no context of {rows} x {length} tokens", "use shorter texts"
            )
        self.rows, self.length = rows, length

    def run(self, row: int, tokens: Sequence[int], past: int) -> np.ndarray:
        """Outputs [tokens, width] float32 of tokens that follow the `past` ones of a row."""
        found, step = [], self.lib.llama_n_batch(self.context)
        for first in range(0, len(tokens), step):
            found.append(self._decode(row, tokens[first : first + step], past + first))
        return np.concatenate(found)

    def _decode(self, row: int, tokens: Sequence[int], past: int) -> np.ndarray:
        count = len(tokens)
        batch = self.lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, past + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = 1
        code = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        assert code == 0, f"llama_decode says {code}"
        read = self.lib.llama_get_embeddings if self.states else self.lib.llama_get_logits
        return np.ctypeslib.as_array(read(self.context), (count, self.width)).copy()

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids of a text; `special`: with those that a text gets by itself."""
        raw = text.encode()
        room = len(raw) + 8
        found = (self.lib.llama_token * room)()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), found, room, special, False)
        assert count >= 0, "a token has at least one byte"
        return list(found[:count])

    @property
    def has_vocabulary(self) -> bool:
        """Whether the file has a tokenizer."""
        return self.lib.llama_vocab_type(self.vocab) != self.lib.LLAMA_VOCAB_TYPE_NONE

    def close(self) -> None:
        """Give context and model back."""
        if self.context is not None:
            self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
        self.context = self.model = None
