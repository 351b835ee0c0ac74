"""Perplexity, accuracy and fidelity against the formula written out in float64."""

import dataclasses
import math

import pytest
import torch

from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError
from compressor.measure import accuracy, fidelity, perplexity
from compressor.model.model import Pooling
from compressor.training.data import DataSpec, load_corpus, make_batches


def engine_of(model, path):
    """An engine whose directory has config and tokenizer, as any candidate's has."""
    model.module.config.architectures = [type(model.module).__name__]
    model.module.config.save_pretrained(path)
    model.processor.save_pretrained(path)
    return TorchEngine.of(model, path)


def with_batches(work, batches, reference=None):
    return dataclasses.replace(
        work, _batches=lambda split, n, **shape: batches, _reference=lambda: reference
    )


def log_probabilities(engine, batch, row):
    """[real tokens, V] float64 of one row, run alone and without its padding."""
    real = batch["attention_mask"][row].bool()
    ids = batch["input_ids"][row][real][None]
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return engine.outputs(alone)["logits"][0].double().log_softmax(-1), ids[0]


@pytest.fixture
def text(make_work):
    """Twelve rows of six documents, three documents in two rows each batch."""
    batches = make_work().batches("heldout", 3)
    for i, batch in enumerate(batches):
        batch["document"] = torch.tensor([0, 0, 1, 1]) + 2 * i
    return batches


def test_perplexity_is_the_formula(pico_llama, make_work, text, tmp_path):
    engine = engine_of(pico_llama(), tmp_path / "a")
    nats, count, written = 0.0, 0, 0
    for batch in text:
        for row in range(4):
            logs, ids = log_probabilities(engine, batch, row)
            nats -= sum(float(logs[t - 1, ids[t]]) for t in range(1, len(ids)))
            count += len(ids) - 1
            written += len(engine.model.processor.decode(ids[1:]).encode())
    found = perplexity.run(engine, perplexity.Options(), with_batches(make_work(), text))
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / written, rel=1e-6)
    assert found["perplexity_low"] < found["perplexity"] < found["perplexity_high"]
    assert found["perplexity_n"] == found["bits_per_byte_n"] == 6


def test_perplexity_is_the_loss_of_transformers_over_windows_of_text(
    pico_llama, make_work, tmp_path
):
    """Stride, first token and bytes of a real stream, against transformers' own loss."""
    words = [f"document {i} holds {i * i} words of no use." for i in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join(words))
    corpus = load_corpus(DataSpec(train=[str(tmp_path / "a.txt")]), "causal-lm")
    engine = engine_of(pico_llama(), tmp_path / "a")
    processor, module = engine.model.processor, engine.model.module

    def batches(split, n, **shape):
        return make_batches(corpus, processor, split, n, task="causal-lm", seed=0, **shape)

    ids = [2]  # every held-out document between BOS and EOS, in one stream
    for document in corpus.documents["heldout"]:
        ids += [*processor(document.text, add_special_tokens=False)["input_ids"], 3, 2]
    ids = ids[:-1]
    windows = [ids[i : i + 24] for i in range(0, len(ids) - 23, 24)]
    assert len(windows) > 4
    losses = [
        module(input_ids=torch.tensor([w]), labels=torch.tensor([w])).loss.item() for w in windows
    ]
    written = sum(len(processor.decode(w[1:], skip_special_tokens=True)) for w in windows)
    work = dataclasses.replace(make_work(), _batches=batches)
    found = perplexity.run(engine, perplexity.Options(length=24), work)
    mean = sum(losses) / len(losses)  # all windows have 23 scored tokens
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    nats = 23 * sum(losses)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / written, rel=1e-5)


def test_bytes_are_bytes_and_not_characters(pico_llama, make_work, tmp_path):
    engine = engine_of(pico_llama(), tmp_path / "a")
    ids = torch.tensor([[2, 10, 11, 12, 3]])  # <s> x x x </s>: special tokens are no text
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = perplexity.run(engine, perplexity.Options(), with_batches(make_work(), [batch]))
    assert found["bits_per_byte"] == pytest.approx(4 * math.log2(found["perplexity"]) / 3, rel=1e-9)


def test_next_token_accuracy_is_a_count(pico_llama, make_work, text, tmp_path):
    engine = engine_of(pico_llama(), tmp_path / "a")
    right = count = 0
    for batch in text:
        for row in range(4):
            logs, ids = log_probabilities(engine, batch, row)
            right += int((logs[:-1].argmax(-1) == ids[1:]).sum())
            count += len(ids) - 1
    found = accuracy.run(engine, accuracy.Options(), with_batches(make_work(), text))
    assert found["accuracy"] == pytest.approx(right / count) and found["accuracy_n"] == 6


def test_accuracy_of_a_classifier_counts_labels(pico_bert, make_work, text, tmp_path):
    engine = engine_of(pico_bert("sequence-classification"), tmp_path / "a")
    answers = [engine.outputs(batch)["logits"].argmax(-1) for batch in text]
    for i, (batch, answer) in enumerate(zip(text, answers, strict=True)):
        batch["labels"] = answer.clone()
        batch["labels"][:i] = 1 - batch["labels"][:i]  # 0, 1 and 2 wrong ones
    work = with_batches(make_work(), text)
    assert accuracy.run(engine, accuracy.Options(), work)["accuracy"] == pytest.approx(9 / 12)
    for batch in text:
        del batch["labels"]
    with pytest.raises(CompressError, match="has none"):
        accuracy.run(engine, accuracy.Options(), work)


def test_measures_refuse_a_model_they_do_not_fit(pico_bert, make_work, text, tmp_path):
    engine = engine_of(pico_bert(), tmp_path / "a")
    work = with_batches(make_work(), text)
    with pytest.raises(CompressError, match="neither a classifier nor"):
        accuracy.run(engine, accuracy.Options(), work)
    with pytest.raises(CompressError, match="no causal language model"):
        perplexity.run(engine, perplexity.Options(), work)
    with pytest.raises(CompressError, match="held-out split has no rows"):
        fidelity.run(engine, fidelity.Options(), with_batches(make_work(), []))


def test_kl_and_agreement_are_the_formula(pico_llama, make_work, text, tmp_path):
    reference = engine_of(pico_llama(seed=0), tmp_path / "a")
    candidate = engine_of(pico_llama(seed=1), tmp_path / "b")
    nats, same, count = 0.0, 0, 0
    for batch in text:
        for row in range(4):
            p, _ = log_probabilities(reference, batch, row)
            q, _ = log_probabilities(candidate, batch, row)
            nats += float((p.exp() * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(p)
    work = with_batches(make_work(), text, reference)
    found = fidelity.run(candidate, fidelity.Options(), work)
    assert found["kl"] == pytest.approx(nats / count, rel=1e-5)
    assert found["top1_agreement"] == pytest.approx(same / count)
    itself = fidelity.run(reference, fidelity.Options(), work)
    assert itself["kl"] == 0 and itself["top1_agreement"] == itself["top1_agreement_low"] == 1


@pytest.mark.parametrize("pooling", [None, Pooling("mean", True)])
def test_cosine_is_the_formula(pooling, pico_bert, make_work, text, tmp_path):
    reference = engine_of(pico_bert(pooling=pooling, seed=0), tmp_path / "a")
    candidate = engine_of(pico_bert(pooling=pooling, seed=1), tmp_path / "b")
    rows = []
    for batch in text:
        a, b = reference.outputs(batch), candidate.outputs(batch)
        for row in range(4):
            real = batch["attention_mask"][row].bool()
            if pooling:
                pairs = [(a["sentence_embedding"][row], b["sentence_embedding"][row])]
            else:
                states = a["last_hidden_state"][row][real], b["last_hidden_state"][row][real]
                pairs = list(zip(*states, strict=True))
            rows.append([float(x @ y / (x.norm() * y.norm())) for x, y in pairs])
    everything = [c for row in rows for c in row]
    work = with_batches(make_work(), text, reference)
    found = fidelity.run(candidate, fidelity.Options(), work)
    assert found["cosine"] == pytest.approx(sum(everything) / len(everything), abs=1e-6)
    assert found["cosine_min"] == pytest.approx(min(sum(r) / len(r) for r in rows), abs=1e-6)
    assert found["cosine_low"] < found["cosine"] < found["cosine_high"]
    itself = fidelity.run(reference, fidelity.Options(), work)
    assert itself["cosine"] == pytest.approx(1) and itself["cosine_min"] == pytest.approx(1)


def test_the_reference_runs_once_for_all_candidates(pico_bert, make_work, text, tmp_path):
    reference = engine_of(pico_bert(seed=0), tmp_path / "a")
    work = with_batches(make_work(), text, reference)
    first = fidelity.run(engine_of(pico_bert(seed=1), tmp_path / "b"), fidelity.Options(), work)
    closed = with_batches(make_work(), text, reference=None)  # same scratch, no reference
    again = fidelity.run(engine_of(pico_bert(seed=1), tmp_path / "b"), fidelity.Options(), closed)
    assert again == first


def test_vectors_of_another_width_are_not_compared(pico_bert, make_work, text, tmp_path):
    lines = []
    reference = engine_of(pico_bert(), tmp_path / "a")
    narrow = engine_of(pico_bert(hidden_size=16), tmp_path / "b")
    work = with_batches(make_work(log=lines), text, reference)
    assert fidelity.run(narrow, fidelity.Options(), work) == {}
    assert "not comparable" in lines[0]


def test_rows_are_taken_from_the_whole_split(pico_llama, make_work, tmp_path):
    from compressor.measure.inputs import heldout

    work = make_work()
    every = work.batches("heldout", 10)
    picked = heldout(with_batches(work, every), rows=12, batch=4, length=16)
    assert [any(p is e for p in picked) for e in every] == [i in (0, 3, 6) for i in range(10)]
