"""Validation loss: the mean over rows, evenly taken, without gradients and without a trace."""

from itertools import pairwise

import pytest
import torch

from compressor.distill import ce, kd
from compressor.training import losses
from compressor.training.batches import Batches
from compressor.training.options import Train
from compressor.training.validation import MOST, validation_batches, validation_loss


class Counted(torch.nn.Module):
    """A loss that depends on the batch, on a buffer and on chance."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.parts = {}

    def forward(self, batch):
        assert not torch.is_grad_enabled()
        self.seen += 1
        loss = batch["input_ids"].float().mean() + 0 * torch.rand(()) * self.seen
        self.parts = {"first": loss}
        return loss


def test_batches_count_by_their_rows_and_nothing_is_left_behind(make_work):
    batches = [{"input_ids": torch.full((rows, 2), value)} for rows, value in ((4, 1), (1, 6))]
    objective, random = Counted(), torch.get_rng_state()
    found = validation_loss(objective, batches, make_work())
    assert found.rows == 5 and found.loss == pytest.approx((4 * 1 + 1 * 6) / 5)
    assert found.parts == {"first": pytest.approx((4 * 1 + 1 * 6) / 5)}
    assert objective.seen == 0 and torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("count", [0, 1, MOST, 100])
def test_batches_are_taken_evenly(make_work, monkeypatch, count):
    work, asked = make_work(), {}

    def batches(split, n, **shape):
        asked.update(split=split, n=n, **shape)
        return Batches(count, lambda i: {"input_ids": torch.tensor([[i]])})

    object.__setattr__(work, "_batches", batches)
    found = validation_batches(Train(batch=3, length=9), work)
    assert asked == {"split": "validation", "n": None, "batch": 3, "length": 9, "least": 0}
    taken = [int(batch["input_ids"]) for batch in found]
    assert len(taken) == min(count, MOST)
    assert len(set(taken)) == len(taken)
    if count == 100:
        steps = [after - before for before, after in pairwise(taken)]
        assert taken[0] == 0 and set(steps) == {3, 4} and 100 - taken[-1] <= 4


def test_no_gradient_of_the_head_is_computed(pico_llama, make_work, monkeypatch):
    student, teacher = pico_llama(), pico_llama(seed=1)
    objective = kd.objective(kd.Options(), student, teacher)
    batches = make_work().batches("validation", 2)
    wanted = sum(objective(batch).item() for batch in batches) / 2

    def none_wanted(value, leaves):
        assert not leaves
        return ()

    monkeypatch.setattr(losses, "_gradients", none_wanted)
    assert validation_loss(objective, batches, make_work()).loss == pytest.approx(wanted, rel=1e-6)


def test_a_split_without_a_row_is_no_mistake_here(pico_llama):
    from compressor.training.data import Corpus, make_batches
    from compressor.training.documents import Document

    few = [Document(text="short")]
    corpus = Corpus("x", "0", "causal-lm", {"train": few, "validation": few})
    given = {"task": "causal-lm", "seed": 0, "length": 64}
    found = make_batches(corpus, pico_llama().processor, "validation", None, least=0, **given)
    assert len(found) == 0


def test_cross_entropy_is_that_of_the_whole_logits(pico_llama, make_work):
    model = pico_llama()
    batches = make_work().batches("validation", 2)
    losses = []
    for batch in batches:
        z = model.module(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        keep = batch["attention_mask"].bool()
        keep = keep[:, :-1] & keep[:, 1:]
        log_p = z[:, :-1].log_softmax(-1)
        chosen = log_p.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        losses.append(-chosen[keep].mean().item())
    got = validation_loss(ce.objective(ce.Options(), model, None), batches, make_work())
    assert got.loss == pytest.approx(sum(losses) / 2, rel=1e-5) and got.rows == 8
