"""compare: fronts, what may be compared, what to pick, and the page and picture of it."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

import compressor
from compressor.errors import CompressError
from compressor.run import scatter

MEASURES = {"size": {}, "latency": {"length": 128}, "perplexity": {"length": 128}}


def candidate(name, mb, ms, quality, key="perplexity", **changes):
    return {
        "name": name,
        "fingerprint": name,
        "engine": "onnxruntime" if "onnx" in name else "torch",
        "parameters": int(mb * 2.5e5),
        "bytes": int(mb * 1e6),
        "peak_memory_bytes": int(mb * 5e6),
        "latency_ms": {"p50": ms, "p95": ms * 1.1, "iqr": 0.1, "rounds": [ms, ms * 1.01]},
        "quality": {key: {"value": quality, "low": quality * 0.97, "high": quality * 1.03, "n": 9}},
    } | changes


TORCH = candidate("original, torch", 23.4, 2.8, 25.8)
FLOAT = candidate("original, onnx", 23.4, 0.9, 25.8)


def ours(mb, ms, quality, fingerprint, **changes):
    return candidate("ours, onnx", mb, ms, quality, fingerprint=fingerprint, **changes)


@pytest.fixture
def make_run(tmp_path):
    """Factory: `make_run(name, *candidates, **keys of the bench)` writes a finished run."""

    def build(name, *candidates, **changes):
        bench = {
            "version": 1,
            "machine": {"cpu": "made-up", "threads": 1, "memory_bytes": 1},
            "threads": 1,
            "rounds": 2,
            "noisy": False,
            "task": "causal-lm",
            "tokenizer": "t",
            "measures": MEASURES,
            "data": {"name": "novels.txt", "sha256": "d"},
            "candidates": list(candidates),
        } | changes
        path = tmp_path / name
        (path / "00-source").mkdir(parents=True)
        (path / "report.json").write_text(json.dumps({"bench": bench}))
        return str(path)

    return build


@pytest.fixture
def runs(make_run):
    """Four runs of one model: half, worse half, quarter, and a large one."""
    return [
        make_run("half", TORCH, FLOAT, ours(2.3, 0.32, 33.0, "h")),
        make_run("worse", TORCH, ours(2.4, 0.40, 38.0, "w")),
        make_run("quarter", TORCH, ours(1.4, 0.29, 61.0, "q")),
        make_run("int4", TORCH, FLOAT, ours(4.1, 0.39, 26.9, "i")),
    ]


def by_name(found):
    return {c["name"]: c for c in found["candidates"]}


def test_fronts_are_those_of_pairwise_comparison(runs):
    found = compressor.compare(runs)
    points = [
        (c["bytes"], c["latency_ms"]["p50"], c["quality"]["value"], c) for c in found["candidates"]
    ]
    assert len(points) == 6 and found["quality"] == "perplexity" and found["lower_is_better"]
    for size, ms, quality, c in points:
        beaten = {
            "bytes": any(
                s <= size and q <= quality and (s, q) != (size, quality) for s, _, q, _ in points
            ),
            "latency": any(
                t <= ms and q <= quality and (t, q) != (ms, quality) for _, t, q, _ in points
            ),
        }
        assert c["front"] == [cost for cost in ("bytes", "latency") if not beaten[cost]]
    assert by_name(found)["worse: ours, onnx"]["front"] == []


def test_what_several_runs_share_appears_once_and_what_they_made_keeps_its_run(runs):
    names = list(by_name(compressor.compare(runs)))
    assert names[:3] == ["original, torch", "original, onnx", "half: ours, onnx"]
    assert sum("original" in name for name in names) == 2


def test_the_pick_is_the_cheapest_that_is_nearly_as_good_as_the_best(runs):
    found = compressor.compare(runs)
    assert found["picked"] == "int4: ours, onnx"
    assert found["pick"] == (
        "Pick int4: ours (onnx): against original (torch) it is 5.7x smaller and 7.2x faster, and "
        "its perplexity of 26.90 is within 5% of the best, 25.80."
    )
    assert found["truths"] == [
        "Nothing speaks for worse: ours (onnx): half: ours (onnx) is smaller, faster and better "
        "(33.00 against 38.00)."
    ]


def test_keep_what_there_is_when_nothing_is_good_enough(runs):
    found = compressor.compare([runs[0]])
    assert found["picked"] == "original, onnx"  # as good, as large, and faster
    found = compressor.compare([runs[2]])
    assert found["picked"] == "original, torch"
    assert found["pick"] == (
        "Keep original (torch): nothing smaller stays within 5% of the best perplexity; the "
        "nearest, ours (onnx), is 17x smaller and 9.7x faster, with 61.00 against 25.80."
    ).replace("17x", "16.7x")


def test_no_gain_is_no_reason_to_change(make_run):
    alike = make_run("alike", TORCH, ours(23.3, 2.75, 25.8, "a"))
    assert compressor.compare([alike])["pick"] == (
        "Keep original (torch): nothing as good is smaller or faster."
    )
    slow = make_run("slow", TORCH, ours(11.7, 8.4, 25.9, "s"))
    found = compressor.compare([slow])
    assert found["pick"] == (
        "Keep original (torch): ours (onnx) is 2.0x smaller and NOT faster (3.0x slower), on "
        "balance no gain."
    )
    assert found["truths"] == ["ours (onnx) is not faster than original (torch)."]


def test_what_is_neither_smaller_nor_faster_is_said(make_run):
    run = make_run("large", TORCH, FLOAT, ours(24.0, 1.2, 25.9, "l"))
    assert compressor.compare([run])["truths"][0] == (
        "ours (onnx) is not smaller than original (torch); not smaller and not faster than "
        "original (onnx)."
    )


def test_a_slower_day_slows_the_yardstick_too(make_run):
    slow = TORCH | {"latency_ms": {"p50": 5.6, "rounds": [5.6, 5.7]}}
    a = make_run("a", TORCH, ours(2.3, 0.4, 33.0, "a"))
    b = make_run("b", slow, ours(2.2, 0.6, 34.0, "b"))
    found = compressor.compare([a, b])
    assert by_name(found)["b: ours, onnx"]["latency_ms"]["p50"] == pytest.approx(0.3)
    assert found["notes"] == [
        "The machine had another speed in b; latencies there are scaled by that of original, "
        "torch, which all of them timed."
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threads": 2}, "half was timed with 1 thread of made-up, other with 2 threads"),
        ({"machine": {"cpu": "another"}}, "other with 1 thread of another"),
        ({"measures": MEASURES | {"latency": {"length": 64}}}, "timed different shapes"),
        ({"measures": {"size": {}, "perplexity": MEASURES["perplexity"]}}, "other did not measure"),
    ],
)
def test_speeds_that_mean_different_things_are_left_out(runs, make_run, changes, said):
    other = make_run("other", TORCH, ours(1.0, 0.2, 26.0, "o"), **changes)
    found = compressor.compare([runs[0], other])
    assert len(found["notes"]) == 1 and said in found["notes"][0]
    assert all(c["latency_ms"] is None and "latency" not in c["front"] for c in found["candidates"])
    assert found["picked"] == "other: ours, onnx" and "faster" not in found["pick"]


def test_noisy_speeds_are_left_out_and_others_stay(runs, make_run):
    noisy = make_run("noisy", TORCH, ours(1.0, 0.1, 26.0, "n"), noisy=True)
    found = by_name(compressor.compare([runs[0], noisy]))
    assert found["noisy: ours, onnx"]["latency_ms"] is None
    assert found["half: ours, onnx"]["latency_ms"]["p50"] == pytest.approx(0.32)
    assert "busy while noisy" in compressor.compare([runs[0], noisy])["notes"][0]
    found = by_name(compressor.compare([noisy, runs[0]]))  # the original is known from both
    assert found["original, torch"]["latency_ms"]["p50"] == pytest.approx(2.8)


def test_likeness_to_another_original_is_no_common_quality(make_run):
    likeness = {"measures": {"size": {}, "fidelity": {}}, "task": "feature-extraction"}
    first = candidate("original, torch", 9, 3, 1.0, key="cosine")
    a = make_run("a", first, ours(2, 1, 0.9, "a", key="cosine"), **likeness)
    another = first | {"fingerprint": "another"}
    b = make_run("b", another, ours(3, 1, 0.8, "b", key="cosine"), **likeness)
    with pytest.raises(CompressError, match="no quality was measured in the same way by all"):
        compressor.compare([a, b])
    assert compressor.compare([a])["quality"] == "cosine"


def test_directories_that_cannot_be_compared_are_explained(runs, make_run, tmp_path):
    def refused(*given):
        with pytest.raises(CompressError) as caught:
            compressor.compare(given)
        assert caught.value.hint
        return caught.value.what

    data = make_run("data", TORCH, data={"name": "other.txt", "sha256": "e"})
    assert "different data (novels.txt and other.txt)" in refused(runs[0], data)
    task = make_run("task", TORCH, task="text-classification")
    assert "for causal-lm and 'task' for text-classification" in refused(runs[0], task)
    assert "does not exist" in refused(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "neither a run nor a bench" in refused(tmp_path / "empty")
    (tmp_path / "unfinished" / "00-source").mkdir(parents=True)
    assert "not finished" in refused(tmp_path / "unfinished")
    (tmp_path / "unfinished" / "report.json").write_text('{"bench": null}')
    assert "measured nothing" in refused(tmp_path / "unfinished")
    (tmp_path / "unfinished" / "report.json").write_text("{")
    assert "is damaged" in refused(tmp_path / "unfinished")
    old = json.loads((tmp_path / "data" / "report.json").read_text())
    del old["bench"]["data"]
    (tmp_path / "data" / "report.json").write_text(json.dumps(old))
    assert "older version" in refused(data)
    assert "nothing to compare" in refused()


class Page(HTMLParser):
    """Collects tags, attribute names and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.names, self.text = set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text.append(data)


def test_out_holds_the_json_one_page_that_loads_nothing_and_a_picture(runs, tmp_path):
    out = tmp_path / "out"
    found = compressor.compare(runs, out=out)
    assert sorted(p.name for p in out.iterdir()) == ["front.png", "report.html", "report.json"]
    assert json.loads((out / "report.json").read_text()) == found
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & page.tags
    assert not {"src", "href", "onload"} & page.names and "url(" not in text
    assert "prefers-color-scheme:dark" in text and found["pick"] in page.text
    for svg in re.findall(r"<svg.*?</svg>", text):
        assert ElementTree.fromstring(svg).tag == "svg"
    assert str(tmp_path) not in text
    compressor.compare(runs, out=out)  # its own result is replaced
    (out / "mine.txt").write_text("")
    with pytest.raises(CompressError, match=r"holds other files \(mine.txt\)"):
        compressor.compare(runs, out=out)


def test_hostile_names_stay_text(make_run, tmp_path):
    name = "<script>alert('x')</script>$_{&"
    a = candidate(name, 9, 3, 25.0)
    run = make_run("a", a, candidate(f"{name} 2", 3, 1, 25.5))
    compressor.compare([run], out=tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "script" not in page.tags and name in page.text


def test_labels_cover_no_dot_and_no_other_label(runs, make_run):
    crowd = [make_run(f"run-{i}", TORCH, ours(2 + i / 50, 0.3, 33 + i, str(i))) for i in range(12)]
    for given in (runs, crowd):
        for cost in ("bytes", "latency"):
            drawn = scatter.chart(compressor.compare(given), cost)
            boxes = [scatter._box(p.label) for p in drawn.points if p.label]
            dots = [(p.x - 6, p.y - 6, p.x + 6, p.y + 6) for p in drawn.points]
            for i, box in enumerate(boxes):
                assert scatter._inside(box)
                assert scatter._hits(box, boxes[:i] + boxes[i + 1 :] + dots) == 0
            assert len(boxes) >= 4


def test_better_is_up_and_cheaper_is_left(runs):
    drawn = scatter.chart(compressor.compare(runs), "bytes")
    points = {p.name: p for p in drawn.points}
    good, bad = points["int4: ours, onnx"], points["quarter: ours, onnx"]
    assert good.y < bad.y and bad.x < good.x
    assert drawn.y_title == "perplexity (lower is better)"
    xs = [x for x, _ in drawn.stairs]
    assert xs == sorted(xs)


def test_one_candidate_has_no_chart(make_run, tmp_path):
    found = compressor.compare([make_run("a", TORCH)], out=tmp_path / "out")
    assert found["pick"] == "original (torch) is alone: there is nothing to compare it with."
    assert scatter.chart(found, "bytes") is None
