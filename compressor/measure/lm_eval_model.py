"""Any engine of a causal language model as a model class of lm-eval; imported only by lm_eval.py.

    loglikelihood = sum over the tokens of a continuation of  ln p(token | tokens before it)

Tokens are cut and joined as lm-eval's own HFLM does it, so its numbers are ours up to the order of
sums. Rows are batched, the longest first, and padded on the left; generation is greedy.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from torch import Tensor

from compressor.engines import Engine
from compressor.engines.generate import greedy_tokens
from compressor.errors import CompressError
from compressor.measure.inputs import refuse_nan
from compressor.training.workbench import Batch


class EngineLM(TemplateLM):
    """See the module.

    Args:
        engine: of a causal language model.
        processor: its tokenizer.
        length: tokens of a row at most; longer contexts lose their beginning.
        batch: rows per forward pass.
    """

    def __init__(self, engine: Engine, processor: Any, length: int, batch: int) -> None:
        super().__init__()
        self.tokenizer = processor
        self._engine, self._length, self._batch = engine, length, batch

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; where nothing is said, special tokens as the tokenizer has it, BOS once."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not has_bos_prefix(string, prefix)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding gives it) of every (_, context ids, continuation ids)."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self._length:
            raise CompressError(
                f"a task asks for the likelihood of {longest} tokens and "
                f"'{self._engine.path.name}' takes {self._length} at most",
                "leave the task out",
            )
        rows = [
            ([*context, *continuation][-(self._length + 1) :], len(continuation))
            for _, context, continuation in requests
        ]
        return self._batched(rows, lambda row: len(row[0]), self._score)

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        batch = self._padded([ids[:-1] for ids, _ in rows])
        logits_BSV = refuse_nan(self._engine.path, self._engine.outputs(batch)["logits"], batch)
        found = []
        for logits_SV, (ids, count) in zip(logits_BSV, rows, strict=True):
            log_TV = logits_SV[-count:].double().log_softmax(dim=-1)
            wanted_T = torch.tensor(ids[-count:])
            nats = log_TV.gather(1, wanted_T[:, None]).sum()
            found.append((float(nats), bool((log_TV.argmax(dim=-1) == wanted_T).all())))
        return found

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Nats of every continuation after its context, and whether greedy decoding gives it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Nats of whole texts, in windows as long as the model takes that score each token once."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in cut]
            owners += [index] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """The most likely text after every context, up to what ends it."""
        found = [""] * len(requests)
        alike: dict[str, list[int]] = {}  # requests with the same settings
        for index, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(index)
        for members in alike.values():
            settings = normalize_gen_kwargs(dict(requests[members[0]].args[1]))
            contexts = [self.tok_encode(requests[i].args[0]) for i in members]
            texts = self._batched(contexts, len, partial(self._continue, settings))
            for index, text in zip(members, texts, strict=True):
                found[index] = text
        return found

    def _continue(self, settings: Any, contexts: Sequence[list[int]]) -> list[str]:
        most = settings["max_gen_toks"]
        if settings.get("do_sample"):
            raise CompressError(
                "a task asks for random sampling, and text is generated greedily here",
                "write do_sample: false into its generation_kwargs, or leave the task out",
            )
        if most >= self._length:
            raise CompressError(
                f"a task generates {most} tokens and '{self._engine.path.name}' takes "
                f"{self._length} at most",
                "write a smaller max_gen_toks into its generation_kwargs",
            )
        eos = self.tokenizer.decode(self.eot_token_id)
        ends = handle_stop_sequences(settings["until"], eos=eos)
        given = [ids or [self.prefix_token_id] for ids in contexts]
        batch = self._padded([ids[-(self._length - most) :] for ids in given])
        steps: list[Tensor] = []
        texts: list[str] = []
        for token in greedy_tokens(self._engine, batch, most):
            steps.append(token)
            rows = torch.stack(steps, dim=1).tolist()
            texts = [self._text(row) for row in rows]
            if all(self._ended(*pair, ends) for pair in zip(rows, texts, strict=True)):
                break
        return [postprocess_generated_text(text, ends, None) for text in texts]

    def _text(self, row: list[int]) -> str:
        eot = self.eot_token_id
        row = row[: row.index(eot)] if eot in row else row
        return self.tokenizer.decode(row, skip_special_tokens=True)

    def _ended(self, row: list[int], text: str, ends: list[str]) -> bool:
        return self.eot_token_id in row or any(end and end in text for end in ends)

    def _padded(self, rows: Sequence[list[int]]) -> Batch:
        """Rows padded on the left, [B, S] int64."""
        longest, pad = max(len(row) for row in rows), self.tokenizer.pad_token_id or 0
        short = [longest - len(row) for row in rows]
        ids = torch.tensor([[pad] * n + row for n, row in zip(short, rows, strict=True)])
        mask = (torch.arange(longest) >= torch.tensor(short)[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask}

    def _batched(
        self, rows: Sequence[Any], size: Callable[[Any], int], answer: Callable[..., list[Any]]
    ) -> list[Any]:
        """Answers in the order of the rows, which are asked in batches, the longest first."""
        order = sorted(range(len(rows)), key=lambda i: -size(rows[i]))
        found: list[Any] = [None] * len(rows)
        for start in range(0, len(order), self._batch):
            members = order[start : start + self._batch]
            for place, value in zip(members, answer([rows[i] for i in members]), strict=True):
                found[place] = value
        return found
