"""Rank correlation of sentence pairs: ranks by counting, vectors one text at a time."""

import json
import math

import pytest
import torch

import compressor
from compressor.engines import open_engine
from compressor.errors import CompressError
from compressor.measure import sts
from compressor.measure.embeddings import embed

WORDS = ["stone", "river", "bread", "cloud", "lamp", "ship", "garden", "wolf", "paper", "song"]
PAIRS = [
    (" ".join(WORDS[: 1 + i % 7]), " ".join(WORDS[i % 5 : 3 + i % 9]), float(i * 7 % 6))
    for i in range(24)
]


def by_counting(values):
    """Rank of each: how many are smaller, plus half of its equals."""
    return [sum(w < v for w in values) + (values.count(v) + 1) / 2 for v in values]


def spearman(x, y):
    a, b = by_counting(x), by_counting(y)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    together = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    sides = sum((p - mean_a) ** 2 for p in a), sum((q - mean_b) ** 2 for q in b)
    return together / math.sqrt(sides[0] * sides[1])


def test_it_is_the_formula_with_ties():
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(12, (60,), generator=draw).double()
    y = x + torch.randint(9, (60,), generator=draw)
    found = sts.correlation(x, y)
    assert found["spearman"] == pytest.approx(spearman(x.tolist(), y.tolist()), abs=1e-12)
    assert found["spearman_low"] < found["spearman"] < found["spearman_high"] < 1
    assert found["spearman_n"] == 60
    up = torch.arange(9.0)
    assert sts.correlation(up, up**3)["spearman"] == pytest.approx(1)
    assert sts.correlation(up, -up)["spearman_high"] == pytest.approx(-1)


def test_the_interval_is_that_of_pairs_drawn_anew():
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([2.0, 1.0, 4.0, 3.0, 3.0])
    drawn = torch.randint(5, (1000, 5), generator=torch.Generator().manual_seed(0))
    found = []
    for row in drawn:
        a, b = x[row].tolist(), y[row].tolist()
        if len(set(a)) > 1 and len(set(b)) > 1:
            found.append(spearman(a, b))
    ends = torch.quantile(
        torch.tensor(found, dtype=torch.float64), torch.tensor([0.025, 0.975]).double()
    )
    interval = sts.correlation(x, y)
    assert (interval["spearman_low"], interval["spearman_high"]) == pytest.approx(ends.tolist())


def saved(model, path):
    model.module.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "pairs.csv"
    rows = "".join(f"{a},{b},{score}\n" for a, b, score in PAIRS)
    path.write_text(f"sentence1,sentence2,score\n{rows}")
    return path


def test_a_checkpoint_and_its_export(pico_bert, table, tmp_path):
    """The vector of a text alone, averaged over its tokens, in torch; the export says the same."""
    model = pico_bert()
    folder = saved(model, tmp_path / "a")

    def vector(text):
        ids = torch.tensor([model.processor(text)["input_ids"]])
        return model.module(ids).last_hidden_state[0].mean(dim=0)

    with torch.no_grad():
        cosines = [float(torch.cosine_similarity(vector(a), vector(b), dim=0)) for a, b, _ in PAIRS]
    wanted = spearman(cosines, [score for *_, score in PAIRS])
    options = sts.Options(pairs=table, batch=5)
    sts.check(options, folder)
    assert sts.run(open_engine(folder), options, None)["spearman"] == pytest.approx(wanted)
    artifact = compressor.export_checkpoint(str(folder), to="onnx", out=tmp_path / "onnx")
    sts.check(options, artifact.path)
    served = sts.run(open_engine(artifact.path), options, None)
    assert served["spearman"] == pytest.approx(wanted) and served["spearman_n"] == 24


def test_pooling_is_what_the_directory_says(pico_bert, tmp_path):
    """First token without normalizing: as a sentence-transformers folder asks for it."""
    folder = saved(pico_bert(), tmp_path / "a")
    (folder / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}
    settings |= {"pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    modules = ["transformers.models.Transformer", "models.Pooling"]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_{kind}"}
        for i, (kind, path) in enumerate(zip(modules, ["", "1_Pooling"], strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    engine = open_engine(folder)
    ids = torch.tensor([engine.model.processor("stone river")["input_ids"]])
    with torch.no_grad():
        first = engine.model.module(ids).last_hidden_state[0, 0].double()
    found = embed(engine, ["stone river", "a much longer text than that"], 128, 2)
    torch.testing.assert_close(found[0], first / first.norm(), atol=1e-6, rtol=1e-5)


def test_scores_in_every_form(table, tmp_path):
    wanted = sts._read_pairs(table)
    assert wanted == PAIRS
    bare, lines = tmp_path / "bare.csv", tmp_path / "pairs.jsonl"
    bare.write_text(table.read_text().partition("\n")[2])
    rows = [{"sentence1": a, "sentence2": b, "score": score} for a, b, score in PAIRS]
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    assert sts._read_pairs(bare) == wanted and sts._read_pairs(lines) == wanted


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "sentence1,sentence2\nx,y\n", "no column 'score'"),
        ("a.csv", "sentence1,sentence2,score\nx,y,high\n", "a.csv:2: score 'high' is no number"),
        ("a.csv", "x,y,1\nx,y,nan\n", "row 2: score 'nan' is no number"),
        ("a.csv", "x,y,1\nx,y\n", "row 2 has 2 columns"),
        ("a.jsonl", '{"sentence1": "x", "sentence2": 3, "score": 1}', 'no "sentence2"'),
        ("a.csv", "x,y,1\nz,y,1\n", "no two pairs with different scores"),
        ("a.txt", "x", "holds no pairs"),
    ],
)
def test_a_table_that_is_wrong(name, text, said, pico_bert, tmp_path):
    folder = saved(pico_bert(), tmp_path / "model")
    (tmp_path / name).write_text(text)
    with pytest.raises(CompressError, match=said) as caught:
        sts.check(sts.Options(pairs=tmp_path / name), folder)
    assert caught.value.hint
    with pytest.raises(CompressError, match="does not exist"):
        sts.check(sts.Options(pairs=tmp_path / "absent.csv"), folder)
