"""Recall and NDCG against a search that looks at one query after the other."""

import json
import math
import pydoc_data.topics

import pytest
import torch

import compressor
from compressor.engines import open_engine
from compressor.errors import CompressError
from compressor.measure import retrieval
from compressor.training.sources import paragraphs


def by_hand(similar, relevant, k):
    """Means of recall and NDCG at k over queries; `similar` [Q][P], `relevant` sets of numbers."""
    recalls, gains = [], []
    for row, wanted in zip(similar, relevant, strict=True):
        ranking = sorted(range(len(row)), key=lambda p: -row[p])[:k]
        recalls.append(len(wanted & set(ranking)) / len(wanted))
        dcg = sum(1 / math.log2(i + 2) for i, p in enumerate(ranking) if p in wanted)
        gains.append(dcg / sum(1 / math.log2(i + 2) for i in range(min(len(wanted), k))))
    return sum(recalls) / len(recalls), sum(gains) / len(gains)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_scores_are_the_formulas(k):
    draw = torch.Generator().manual_seed(k)
    similar = torch.rand(20, 15, generator=draw, dtype=torch.float64)
    relevant = [set(torch.randperm(15, generator=draw)[: 1 + q % 5].tolist()) for q in range(20)]
    order = retrieval.nearest(similar, torch.eye(15, dtype=torch.float64), k)
    hits = torch.tensor([[p in relevant[q] for p in row] for q, row in enumerate(order.tolist())])
    counts = torch.tensor([len(found) for found in relevant], dtype=torch.float64)
    recall, ndcg = retrieval.scores(hits.double(), counts)
    wanted = by_hand(similar.tolist(), relevant, k)
    assert (float(recall.mean()), float(ndcg.mean())) == pytest.approx(wanted, abs=1e-12)


@pytest.fixture
def topics(tmp_path):
    """Python's help topics: a topic's first sentence asks for the rest of its first paragraph."""
    path, more = tmp_path / "topics.jsonl", tmp_path / "more.jsonl"
    rows, others = [], []
    for name, text in sorted(pydoc_data.topics.topics.items())[:24]:
        long = [p for p in paragraphs(text) if p.count(". ") >= 2]
        for paragraph in long[:1]:
            first, _, rest = paragraph.partition(". ")
            rows.append({"query": first, "passage": rest, "topic": name})
        others += [{"text": p} for p in long[1:2]]
    rows.append({"query": rows[0]["query"], "passage": others[0]["text"]})  # answered twice
    path.write_text("\n".join(json.dumps(row) for row in rows))
    more.write_text("\n".join(json.dumps(row) for row in others))
    return path, more


def test_a_checkpoint_and_its_export(pico_bert, topics, tmp_path):
    model, (pairs, more) = pico_bert(), topics
    folder = tmp_path / "a"
    model.module.save_pretrained(folder)
    model.processor.save_pretrained(folder)

    def vector(text):
        given = model.processor(text, truncation=True, max_length=64, return_tensors="pt")
        states = model.module(given["input_ids"]).last_hidden_state[0].double().mean(dim=0)
        return states / states.norm()

    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    pool = list(dict.fromkeys(row["passage"] for row in rows))
    pool += [
        t
        for t in dict.fromkeys(json.loads(x)["text"] for x in more.read_text().splitlines())
        if t not in pool
    ]
    queries = list(dict.fromkeys(row["query"] for row in rows))
    relevant = [{pool.index(r["passage"]) for r in rows if r["query"] == q} for q in queries]
    with torch.no_grad():
        passages = torch.stack([vector(text) for text in pool])
        similar = [(passages @ vector(text)).tolist() for text in queries]
    options = retrieval.Options(pairs=pairs, passages=more, at=(1, 10), batch=7)
    retrieval.check(options, folder)
    found = retrieval.run(open_engine(folder), options, None)
    for k in (1, 10):
        wanted = by_hand(similar, relevant, k)
        assert (found[f"recall_at_{k}"], found[f"ndcg_at_{k}"]) == pytest.approx(wanted)
        assert found[f"recall_at_{k}_n"] == len(queries)
    assert 0 < found["ndcg_at_10_low"] < found["ndcg_at_10"] < found["ndcg_at_10_high"] < 1
    assert max(len(found) for found in relevant) == 2
    artifact = compressor.export_checkpoint(str(folder), to="onnx", out=tmp_path / "onnx")
    assert retrieval.run(open_engine(artifact.path), options, None) == pytest.approx(found)


def test_too_few_passages(pico_bert, tmp_path):
    model, path = pico_bert(), tmp_path / "few.csv"
    model.module.save_pretrained(tmp_path / "a")
    model.processor.save_pretrained(tmp_path / "a")
    path.write_text("query,passage\na,b\nc,d\nc,b\n")
    with pytest.raises(CompressError, match="has 2 distinct passages, and the nearest 10") as error:
        retrieval.check(retrieval.Options(pairs=path), tmp_path / "a")
    assert "at: [1]" in error.value.hint
    retrieval.check(retrieval.Options(pairs=path, at=(1,)), tmp_path / "a")
