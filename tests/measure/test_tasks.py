"""Accuracy, perplexity and fidelity of every task against counts and formulas written out."""

import dataclasses
import math

import pytest
import torch

from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError
from compressor.measure import accuracy, fidelity, perplexity
from compressor.measure.inputs import fitting_length
from conftest import character_tokenizer
from families import VOCABULARY, pico, random_inputs


def engine_of(model, path):
    model.module.config.architectures = [type(model.module).__name__]
    model.module.config.save_pretrained(path)
    if model.sizes["vocabulary"]:
        character_tokenizer().save_pretrained(path)
    return TorchEngine.of(model, path)


def heldout_of(model):
    """Three batches of three rows with labels, each row its own document."""
    found = []
    for i in range(3):
        batch = random_inputs(model, seed=i)
        draw = torch.Generator().manual_seed(i)
        if model.task == "image-classification":
            labels = torch.randint(5, (3,), generator=draw)
        else:
            mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
            labels = torch.randint(5, VOCABULARY, mask.shape, generator=draw)
            if model.task == "fill-mask":
                mask = mask * (torch.arange(mask.shape[1]) % 3 == 1)
            labels = labels.masked_fill(mask == 0, -100)
        found.append(batch | {"labels": labels, "document": torch.arange(3) + 3 * i})
    return found


def with_batches(work, batches, reference=None):
    return dataclasses.replace(
        work, _batches=lambda split, n, **shape: batches, _reference=lambda: reference
    )


@pytest.mark.parametrize("name", ["bert", "roberta", "t5", "whisper", "vit", "deit"])
def test_accuracy_counts_right_answers(name, make_work, tmp_path):
    engine = engine_of(pico(name), tmp_path)
    batches, right, count = heldout_of(engine.model), 0, 0
    for batch in batches:
        answer = engine.outputs(batch)["logits"].argmax(-1)
        batch["labels"][:2] = torch.where(batch["labels"][:2] < 0, -100, answer[:2])
        right += int((answer == batch["labels"]).sum())
        count += int((batch["labels"] >= 0).sum())
    found = accuracy.run(engine, accuracy.Options(), with_batches(make_work(), batches))
    assert found["accuracy"] == pytest.approx(right / count) and found["accuracy_n"] == 9
    assert 0.5 < found["accuracy"] < 1


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_perplexity_of_answers_is_the_loss_of_transformers(name, make_work, tmp_path):
    engine = engine_of(pico(name), tmp_path)
    batches, nats, count, written = heldout_of(engine.model), 0.0, 0, 0
    tokenizer = character_tokenizer()
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k != "document"}
        scored = int((batch["labels"] >= 0).sum())
        nats += engine.model.module(**inputs).loss.item() * scored
        count += scored
        written += sum(len(tokenizer.decode(row[row >= 0])) for row in batch["labels"])
    found = perplexity.run(engine, perplexity.Options(), with_batches(make_work(), batches))
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / written, rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_perplexity_is_refused_where_nothing_is_written(name, make_work, tmp_path):
    engine = engine_of(pico(name), tmp_path)
    with pytest.raises(CompressError, match="so it has no perplexity"):
        perplexity.run(engine, perplexity.Options(), make_work())


@pytest.mark.parametrize("name", ["bert", "t5", "whisper", "vit"])
def test_kl_and_agreement_over_real_positions(name, make_work, tmp_path):
    reference = engine_of(pico(name), tmp_path / "a")
    candidate = engine_of(pico(name, seed=1), tmp_path / "b")
    batches, nats, same, count = heldout_of(reference.model), 0.0, 0, 0
    for batch in batches:
        p, q = (e.outputs(batch)["logits"].double() for e in (reference, candidate))
        mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
        keep = torch.ones(3, dtype=torch.bool) if mask is None else mask.bool()
        p, q = p[keep].log_softmax(-1), q[keep].log_softmax(-1)
        nats += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    work = with_batches(make_work(), batches, reference)
    found = fidelity.run(candidate, fidelity.Options(), work)
    assert found["kl"] == pytest.approx(nats / count, rel=1e-5) and found["kl"] > 0
    assert found["top1_agreement"] == pytest.approx(same / count)
    again = with_batches(make_work(), batches, None)  # kept in scratch, input by input
    assert fidelity.run(candidate, fidelity.Options(), again) == found


def test_bare_images_are_compared_patch_by_patch(make_work, tmp_path):
    reference = engine_of(pico("vit", head=False), tmp_path / "a")
    candidate = engine_of(pico("vit", head=False, seed=1), tmp_path / "b")
    batches = [random_inputs(reference.model, seed=i) for i in range(2)]
    cosines = []
    for batch in batches:
        a, b = (e.outputs(batch)["last_hidden_state"].double() for e in (reference, candidate))
        cosines.append(torch.nn.functional.cosine_similarity(a, b, dim=-1))
    found = fidelity.run(
        candidate, fidelity.Options(), with_batches(make_work(), batches, reference)
    )
    assert found["cosine"] == pytest.approx(torch.cat(cosines).mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "most"), [("llama", 128), ("gpt2", 64), ("whisper", 32), ("t5", 500), ("roberta", 127)]
)
def test_rows_fit_the_positions_of_every_family(name, most, tmp_path):
    engine_of(pico(name), tmp_path)
    assert fitting_length(tmp_path, 500) == most
