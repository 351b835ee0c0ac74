"""The report: complete, self-contained, escaped, without absolute paths, honest about speed."""

import copy
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from compressor.run.bench_tables import comparison
from compressor.run.figures import figures
from compressor.run.report import presentable, write_report
from compressor.run.tables import clock, significant
from compressor.run.verdict import verdict


class Page(HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def written(tmp_path, sample_report):
    """The three files of the sample report as text, by suffix."""
    write_report(tmp_path, sample_report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    return {p.suffix: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()}


def test_json_is_the_report(written, sample_report):
    found = json.loads(written[".json"])
    assert found["stages"] == sample_report["stages"]
    assert found.keys() == sample_report.keys()


def test_page_loads_nothing(written):
    page = Page(written[".html"])
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onload"} & {name for name, _ in page.attributes}
    assert "url(" not in written[".html"] and "@import" not in written[".html"]
    assert "prefers-color-scheme:dark" in written[".html"]


def test_both_texts_show_the_same_numbers(written):
    text = " ".join(Page(written[".html"]).text)
    for shown in ("22.71M", "0.953 [0.943, 0.953]", "5.0x smaller", "01-prune.minitron"):
        assert shown in written[".md"] and shown in text
    assert "DIR = '03-export.onnx'" in written[".md"]


def test_the_validation_loss_stands_beside_the_training(written):
    text = " ".join(Page(written[".html"]).text)
    for shown in (written[".md"], text):
        assert "steps 300; validation loss 3.14 before, 0.25 after (512 rows)" in shown


def test_what_spikes_cost_is_said(tmp_path, sample_report):
    bits = {"q": 1.5, "k": 1.25, "v": 0.5}
    found = {"firing_rate": 0.169, "ac": 1205105.4, "mac": 50176, "entropy": bits}
    found |= {"energy_nj": 1315.4, "float_energy_nj": 8432.0}
    found["untrained"] = {"entropy": bits | {"v": 0.75}}
    found["formula"] = "E = 4.6 pJ x MAC + 0.9 pJ x AC"
    neurons = {"q_neuron": 0.1, "mlp.neuron": 0.25}
    layers = {f"qsd.layers.1.{n}": {"firing_rate": r, "ac": 1000.0} for n, r in neurons.items()}
    found["layers"] = layers | {"qsd.last": {"firing_rate": 0.5, "ac": 7.0}}
    sample_report["stages"][1]["notes"] = {"spikes": found}
    write_report(tmp_path, sample_report)
    shown = "16.9% | 1,205,105 | 50,176 | 1315 | 8432 | 6.4x | 1.50, 1.25, 0.50 | 1.50, 1.25, 0.75"
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert shown in text and found["formula"] in text
    assert "qsd.layers.1 | 10.0% to 25.0% | 2,000" in text
    assert "qsd.last | 50.0% to 50.0% | 7" in text


def test_no_absolute_path_is_left(written):
    for text in written.values():
        assert "/home/" not in text and "someone" not in text
    assert "model: encoder" in written[".md"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://arxiv.org/abs/2407.14679", "see https://arxiv.org/abs/2407.14679"),
        ("out/demo/04-export.onnx, 310 sentences/s", "out/demo/04-export.onnx, 310 sentences/s"),
        ("package:minilm/sub/dir", "package:minilm/sub/dir"),
        ("['/data/my/a.txt', '/b/c.txt']", "['a.txt', 'c.txt']"),
        ("~/models/x", "x"),
        (math.nan, None),
        ({"a": (1.0, math.inf)}, {"a": [1.0, None]}),
    ],
)
def test_presentable(text, expected):
    assert presentable(text) == expected


HOSTILE = "<script>alert('x')</script>|`~&\"'\n# h"


def poison(value):
    if isinstance(value, dict):
        return {k: poison(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poison(v) for v in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_text_stays_text(tmp_path, sample_report):
    write_report(tmp_path, poison(sample_report))
    page = Page((tmp_path / "report.html").read_text())
    assert "script" not in page.tags
    assert HOSTILE in page.text
    prose = re.sub(r"(?ms)^(`{3,})\w+$.*?^\1$", "", (tmp_path / "report.md").read_text())
    assert "<script" not in prose and "\n# h" not in prose


def test_every_chart_is_well_formed(sample_report):
    found = figures(sample_report)
    titles = " ".join(figure.title for figure in found)
    for word in ("Size", "Latency", "cosine", "layers", "neurons", "heads", "loss"):
        assert word in titles
    for figure in found:
        numbers = re.findall(r' (?:width|height|x|y)="([^"]+)"', figure.svg)
        assert all(math.isfinite(float(n)) for n in numbers)
        assert ElementTree.fromstring(figure.svg).tag == "svg"


def test_removed_layers_look_removed(sample_report):
    chart = next(f for f in figures(sample_report) if "layers" in f.title)
    assert re.findall(r'class="(ours|gone)"', chart.svg) == ["ours", "gone", "ours"]


def test_a_stage_that_removed_no_layer_says_so_and_draws_its_residual_channels(sample_report):
    notes = sample_report["stages"][0]["notes"]
    notes["kept_layers"] = list(range(3))
    notes["importance"]["hidden"] = [0.5, 1.0, 2.0, 4.0]
    found = {figure.title.partition(": ")[2]: figure for figure in figures(sample_report)}
    assert found["importance of layers"].caption.endswith("No layer was removed.")
    cells = ElementTree.fromstring(found["importance of residual channels"].svg).iter("rect")
    shades = [float(cell.attrib["opacity"]) for cell in cells]
    assert len(shades) == 4 and shades == sorted(shades) and shades[-1] == 1


def depth_of(scores, ranking="accuracy", window=1, blocks="layers"):
    return {"blocks": blocks, "ranking": ranking, "window": window, "scores": scores}


def drawn_layers(sample_report, depth, kept):
    """Charts of layers, each with its bars: [(class, top, height)]."""
    stage = sample_report["stages"][0]
    stage["notes"] = {"importance": {"depth": depth}, "kept_layers": kept}
    rects = []
    charts = [f for f in figures(sample_report) if "layers" in f.title]
    for chart in charts:
        found = [e.attrib for e in ElementTree.fromstring(chart.svg).iter("rect")]
        rects.append([(r["class"], float(r["y"]), float(r["height"])) for r in found])
    return charts, rects


def test_a_layer_that_is_better_gone_hangs_below_zero(sample_report):
    (chart,), (bars,) = drawn_layers(sample_report, [depth_of([0.2, -0.1, 0.0])], [0, 2])
    assert "right answers" in chart.caption and ">-0.1<" in chart.svg
    (_, top, up), (style, zero, down), (_, _, none) = bars
    assert zero == pytest.approx(top + up, abs=0.1) and style == "gone"
    assert up == pytest.approx(2 * down, abs=0.2) and down > 10 and none == 0


def test_the_windows_that_decided_are_drawn_one_chart_for_each_stack(sample_report):
    encoder = depth_of([3.0, 1.0, 2.0], "perplexity", 2, "encoder.block")
    decoder = depth_of([0.5, 0.25], "block_influence", 1, "decoder.block")
    charts, bars = drawn_layers(sample_report, [encoder, decoder], [0, 3, 4])
    assert [[bar[0] for bar in own] for own in bars] == [["ours", "gone", "ours"], ["ours", "gone"]]
    assert "first of 2 layers" in charts[0].svg and "window" in charts[0].caption
    for chart, word in zip(charts, ("Cross-entropy", "Block influence"), strict=True):
        assert word in chart.caption
    assert "encoder.block" in charts[0].title and "decoder.block" in charts[1].title


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0, 5.0], [1e-9, 2e-9], [1e6, 3.0], [-2.0, -1]])
def test_charts_stand_odd_numbers(sample_report, values):
    stage = sample_report["stages"][1]
    stage["notes"] = {"loss": [[1, values[0]], [2, None], [3, values[1]]]}
    stage["notes"]["importance"] = {"depth": [depth_of(values)], "neurons": [values]}
    for figure in figures(sample_report):
        ElementTree.fromstring(figure.svg)


def test_a_run_without_measures_or_exports_has_a_report(tmp_path, sample_report):
    sample_report |= {"bench": None, "gates": [], "artifacts": []}
    for stage in sample_report["stages"]:
        stage |= {"notes": {}, "planned": None}
    write_report(tmp_path, sample_report)
    assert "01-prune.minitron" in (tmp_path / "report.md").read_text()


def test_sizes_stand_beside_the_planned_ones(tmp_path, sample_report):
    sizes = {"bits": 4.0, "bytes": 85464.0, "huffman_bits": 2.85, "huffman_bytes": 70778.75}
    sizes |= {"weights": 100_000, "stored_bytes": 60_000}
    stage = sample_report["stages"][1]
    notes = {"size": sizes, "training": {"steps": 3}}
    stage |= {"bytes": 2_400_000, "weight_bytes": 2_300_000, "notes": notes}
    stage["planned"] = {"bytes_out": 2_200_000}
    write_report(tmp_path, sample_report)
    text = (tmp_path / "report.md").read_text()
    assert "| 2.4 | 2.3 | 2.2 |" in text
    stored = "4.00 bits a weight, 60,000 bytes stored; in a Huffman code 2.85, about 45,625"
    formula = " (85,464 and 70,779 by the formula of 1802.05668)"
    assert stored + formula in text
    del notes["training"]
    write_report(tmp_path, sample_report)
    text = (tmp_path / "report.md").read_text()
    assert stored in text and formula not in text


def changed(sample_report, latency, **changes):
    """The sample's bench with another latency of its last candidate."""
    bench = copy.deepcopy(sample_report["bench"])
    bench["candidates"][-1] |= changes | {"latency_ms": latency}
    return bench


def test_verdict_compares_with_each_original(sample_report):
    lines = verdict(sample_report["bench"], "In-domain.")
    assert lines[0] == (
        "Against original (torch), ours (onnx) is 5.0x smaller, 5.0x faster and 5.0x lower in peak "
        "memory."
    )
    assert "original (onnx float32)" in lines[1] and "3.9x faster" in lines[1]
    assert lines[2:] == [
        "Quality of ours (onnx): cosine 0.953 [0.943, 0.953] (n = 512 documents).",
        "In-domain.",
    ]


def test_slower_and_larger_are_said_plainly(sample_report):
    slow = {"p50": 62.4, "p95": 70.0, "rounds": [62.4, 61.0, 64.0]}
    lines = verdict(changed(sample_report, slow, bytes=181_800_000))
    assert "2.0x larger" in lines[0] and "NOT faster (2.0x slower)" in lines[0]


def test_a_difference_that_not_every_round_shows_is_none(sample_report):
    close = {"p50": 24.0, "p95": 26.0, "rounds": [20.0, 24.0, 26.0]}
    assert "not measurably faster or slower" in verdict(changed(sample_report, close))[1]


def test_noise_withholds_speed_only(sample_report):
    lines = verdict(sample_report["bench"] | {"noisy": True})
    assert not any("faster" in line for line in lines)
    assert any("no verdict on speed" in line for line in lines)
    assert any("smaller" in line for line in lines)


def test_several_qualities_go_to_a_table_of_their_own(tmp_path, sample_report):
    for i, candidate in enumerate(sample_report["bench"]["candidates"]):
        candidate["quality"]["perplexity"] = {"value": 10.0 + i, "low": None, "high": None, "n": 9}
    write_report(tmp_path, sample_report)
    assert "| ours, onnx | 0.953 [0.943, 0.953] | 12.00 |" in (tmp_path / "report.md").read_text()
    assert comparison(sample_report["bench"]).header[-1] == "cosine"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00012, "0.00012"),
        (1.234, "1.23"),
        (99.96, "100"),
        (31337, "31337"),
        (None, "-"),
    ],
)
def test_significant(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.44, "0.4 s"), (12, "12 s"), (185, "3:05")])
def test_clock(value, text):
    assert clock(value) == text
