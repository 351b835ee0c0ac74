"""Texts as vectors of unit length, as a sentence encoder gives them in any engine.

The vector is the engine's `sentence_embedding`, or, where no pooling is defined, the mean of the
states of all real tokens, as sentence-transformers takes it for a plain checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.engines import Engine
from compressor.errors import CompressError
from compressor.measure.inputs import fitting_length, refuse_nan
from compressor.model.checkpoint import load_processor
from compressor.training.reading import reading_of
from compressor.training.rows import text_rows

ENCODERS = ("feature-extraction",)


def text_tokenizer(path: Path) -> Any:
    """The tokenizer of an encoder of sentences.

    Raises:
        CompressError: the model in `path` reads something else, or has no tokenizer.
    """
    kind = reading_of(path).kind
    if kind != "text":
        raise CompressError(
            f"'{path.name}' reads {kind} and gives no vector of a text",
            "leave sts and retrieval out of measures; fidelity works for every model",
        )
    found = load_processor(path)
    if found is None:
        raise CompressError(
            f"'{path.name}' has no tokenizer, so it can read no text",
            "add tokenizer.json and tokenizer_config.json to its directory",
        )
    return found


def embed(engine: Engine, texts: Sequence[str], length: int, batch: int) -> Tensor:
    """Vectors of texts, in their order.

    Args:
        engine: of a sentence encoder.
        texts: each cut at `length` tokens, or at the most that the model takes.
        length: tokens.
        batch: texts per forward pass.

    Returns:
        [texts, H] float64, each of length 1.

    Raises:
        CompressError: see text_tokenizer; or the model gives NaN.
    """
    processor = text_tokenizer(engine.path)
    rows = text_rows(
        texts, range(len(texts)), processor, fitting_length(engine.path, length), labels=None
    )
    found = []
    for start in range(0, len(rows), batch):
        members = np.arange(start, min(start + batch, len(rows)), dtype=np.int64)
        given = rows.read(members)
        outputs = engine.outputs(given)
        if "sentence_embedding" in outputs:
            vectors_BH = refuse_nan(engine.path, outputs["sentence_embedding"], given).double()
        else:
            states_BSH = refuse_nan(engine.path, outputs["last_hidden_state"], given).double()
            mask_BS1 = given["attention_mask"].double()[..., None]
            states_BSH = states_BSH.masked_fill(mask_BS1 == 0, 0.0)  # NaN may stand in padding
            vectors_BH = states_BSH.sum(dim=1) / mask_BS1.sum(dim=1)
        found.append(torch.nn.functional.normalize(vectors_BH, dim=-1))
    return torch.cat(found)
