"""A search on pico models: what it leaves, kill and resume, redo, refusals, what it tells."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml

import compressor
from compressor.distill import kd
from compressor.errors import CompressError
from compressor.model.manifest import read_manifest
from compressor.prune import scores
from compressor.run import estimates, preflight, search_latency, setting
from compressor.run.forget import WEIGHTS_REMOVED
from compressor.run.machine import machine
from compressor.run.setting import open_source
from compressor.screen import Silent
from compressor.search.minitron import Options
from conftest import letter_tokenizer

TRAIN = {"steps": 3, "batch": 2, "length": 16, "lr": 1e-3, "warmup": 1, "precision": "float32"}
SEARCH = {"parameters": 0.7, "tolerance": 0.1, "multiple": 4, "candidates": 2}
SEARCH |= {"layers": [3, 2], "hidden": [32]}
SEARCH |= {"samples": 8, "length": 16, "train": TRAIN}
STAGE = "01-search.minitron"


@pytest.fixture
def profile(tmp_path):
    """Factory: a profile of a search with these changes, then the stages after it."""

    def write(*after, name="search", **changes):
        stages = [{"search.minitron": SEARCH | changes}, *after]
        content = {"name": name, "stages": stages, "measures": []}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def arguments(llama_folder, text_file, tmp_path):
    return {"model": str(llama_folder), "data": str(text_file), "out": tmp_path / "out"}


@pytest.fixture
def finished(profile, arguments, tmp_path_factory):
    """A finished search of two candidates; made once, and copied for every test."""
    kept, out = tmp_path_factory.getbasetemp() / "finished-search", arguments["out"]
    if kept.is_dir():
        shutil.copytree(kept, out)
    home = compressor.run(profile(), **arguments).path  # a copy has nothing left to do
    if not kept.is_dir():
        shutil.copytree(home, kept)
    return home


def rows_of(home, stage=STAGE):
    return read_manifest(home / stage).metrics["notes"]["search"]["candidates"]


def spent_on(home):
    """Seconds of all stages of all candidates of a search that are done."""
    manifests = [read_manifest(d.parent) for d in home.glob("search/01/*/*/manifest.json")]
    return sum(m.stages[-1].seconds for m in manifests if m.stages)


def bits(home, stage=STAGE):
    return read_manifest(home / stage).files["model.safetensors"]["sha256"]


def test_the_least_validation_loss_wins_and_losers_keep_reports_without_weights(
    finished, arguments
):
    home = finished
    rows = rows_of(home)
    best = min(rows, key=lambda row: row["after"])
    assert [row["chosen"] for row in rows] == [row is best for row in rows] and len(rows) == 2
    assert len({json.dumps(row["sizes"]) for row in rows}) == 2
    total = compressor.inspect(arguments["model"])["parameters"]
    found = compressor.inspect(str(home / STAGE))
    assert found["parameters"] == best["parameters"] and found["sizes"] == best["sizes"]
    assert compressor.verify(home / STAGE)["ok"]
    for row in rows:
        assert abs(row["parameters"] / (0.7 * total) - 1) <= 0.1
        own = home / "search" / "01" / row["name"]
        assert (own / "report.html").is_file() and (own / "profile.yaml").is_file()
        assert not list(own.rglob("model*.safetensors")) and not (own / ".scratch").exists()
        assert read_manifest(own / "02-distill.kd").metrics[WEIGHTS_REMOVED]
    record = read_manifest(home / STAGE).stages[-1]
    assert record.method == "search.minitron" and record.teacher and record.data
    assert str(home) not in (home / STAGE / "manifest.json").read_text()


def test_a_candidate_has_the_bits_of_an_ordinary_run(finished, arguments, tmp_path):
    home = finished
    row = next(row for row in rows_of(home) if row["chosen"])
    own = home / "search" / "01" / row["name"]
    shutil.copy(own / "profile.yaml", tmp_path / "alone.yaml")
    alone = compressor.run(tmp_path / "alone.yaml", **arguments | {"out": tmp_path / "alone"})
    assert bits(alone.path, "02-distill.kd") == bits(home)


def test_nothing_that_a_candidate_leaves_says_where_the_shared_scores_stand(finished):
    files = [file for file in (finished / "search" / "01").rglob("*") if file.is_file()]
    assert sum(file.name == "profile.yaml" for file in files) == 2
    assert not [file for file in files if b"/importance.safetensors" in file.read_bytes()]


CHILD = "import sys, compressor; given = sys.argv; "
CHILD += "compressor.run(given[1], model=given[2], data=given[3], out=given[4])"


def test_kill_9_between_candidates_and_the_same_command_give_the_same_bits(
    finished, profile, arguments, tmp_path
):
    path, whole = profile(), finished
    arguments["out"] = tmp_path / "killed"
    given = [str(path), *(str(arguments[key]) for key in ("model", "data", "out"))]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *given],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    place, end = arguments["out"] / "search" / "01", time.monotonic() + 60
    while not list(place.glob("02-*/01-*/manifest.json")):
        assert child.poll() is None and time.monotonic() < end, "never came to candidate 2"
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (arguments["out"] / STAGE).exists()
    first = next(place.glob("01-*/02-*"))
    seconds = read_manifest(first).stages[-1].seconds
    home = compressor.run(path, **arguments).path
    assert read_manifest(first).stages[-1].seconds == seconds, "candidate 1 was trained again"
    assert bits(home) == bits(whole)
    told = [{k: row[k] for k in ("name", "before", "after")} for row in rows_of(home)]
    assert told == [{k: r[k] for k in ("name", "before", "after")} for r in rows_of(whole)]


def test_finished_candidates_are_not_trained_again_until_redo(profile, arguments, monkeypatch):
    objective, count = kd.objective, []

    def counted(options, student, teacher):
        if next(student.module.parameters()).device.type == "cpu":  # a rehearsal has no weights
            count.append(1)
            if len(count) == 2:
                raise KeyboardInterrupt
        return objective(options, student, teacher)

    monkeypatch.setattr(kd, "objective", counted)
    with pytest.raises(KeyboardInterrupt):
        compressor.run(profile(), **arguments)
    kept = arguments["out"] / "search" / "01" / "search.json"
    spent, record = spent_on(arguments["out"]), json.loads(kept.read_text())
    assert record["seconds"] >= spent > 0
    kept.write_text(json.dumps(record | {"seconds": record["seconds"] + 1000}))
    home = compressor.run(profile(), **arguments).path
    assert len(count) == 3
    took = read_manifest(home / STAGE).stages[-1].seconds
    assert took >= 1000 + spent_on(home), "seconds of the first attempt are not counted"
    assert took < 1200
    first = bits(home)
    compressor.run(profile(), **arguments)
    assert len(count) == 3
    compressor.run(profile(), **arguments, redo=1)
    assert len(count) == 5 and bits(home) == first
    assert read_manifest(home / STAGE).stages[-1].seconds < 1000


def test_a_changed_search_is_refused_until_redo(finished, profile, arguments):
    home = finished
    change = ["stages.1.train.steps=4"]
    with pytest.raises(CompressError, match=r"train.steps was 3, now 4"):
        compressor.run(profile(), **arguments, set=change)
    before = bits(home)
    compressor.run(profile(), **arguments, set=change, redo=1)
    assert bits(home) != before
    assert read_manifest(home / STAGE).metrics["notes"]["search"]["steps"] == 4


def test_a_lost_stage_is_searched_again_although_its_candidates_stand_without_weights(
    finished, profile, arguments
):
    wanted = bits(finished)
    shutil.rmtree(finished / STAGE)
    compressor.run(profile(), **arguments)
    assert bits(finished) == wanted


def test_the_stage_has_the_notes_and_the_scores_of_its_winner(finished):
    notes = read_manifest(finished / STAGE).metrics["notes"]
    assert {"sizes", "kept_layers", "importance", "training", "validation"} <= notes.keys()
    assert compressor.inspect(str(finished / STAGE), importance=True)


def test_losses_of_candidates_of_any_depth_are_those_of_their_logits(profile, arguments):
    home = compressor.run(
        profile(method="distill.minitron", layers=[3, 1], tolerance=0.5), **arguments
    ).path
    rows = rows_of(home)
    assert {row["sizes"]["layers"] for row in rows} == {3, 1}
    for row in rows:
        stage = home / "search" / "01" / row["name"] / "02-distill.minitron"
        parts = read_manifest(stage).metrics["notes"]["validation"]["parts"]
        assert ("alpha" in parts) == (row["sizes"]["layers"] == 1)
        assert row["after"] == pytest.approx(parts["logits"], rel=1e-5)


def test_importance_is_measured_once_for_all(profile, arguments, monkeypatch):
    measure, calls = scores.measure_importance, []

    def counted(*given, **named):
        calls.append(1)
        return measure(*given, **named)

    monkeypatch.setattr(scores, "measure_importance", counted)
    compressor.run(profile(), **arguments)
    assert calls == [1]


def failing(widths, monkeypatch):
    """Make the loss of candidates with these MLP widths NaN."""
    objective = kd.objective

    class Broken(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, batch):
            return self.inner(batch) * float("nan")

    def build(options, student, teacher):
        found = objective(options, student, teacher)
        return Broken(found) if student.sizes["mlp"] in widths else found

    monkeypatch.setattr(kd, "objective", build)


def test_a_candidate_that_diverges_loses_and_says_so(profile, arguments, monkeypatch):
    lists = {"mlp": [48, 24], "layers": [2], "heads": [4], "tolerance": 0.3}
    failing({24}, monkeypatch)
    home = compressor.run(profile(**lists), **arguments).path
    rows = rows_of(home)
    assert {row["sizes"]["mlp"] for row in rows} == {24, 48}
    for row in rows:
        assert ("nan" in (row["failed"] or "")) == (row["sizes"]["mlp"] == 24)
    assert next(row for row in rows if row["chosen"])["sizes"]["mlp"] == 48


def test_when_all_candidates_diverge_the_error_says_so(profile, arguments, monkeypatch):
    failing(set(range(49)), monkeypatch)
    with pytest.raises(CompressError, match=r"all 2 candidates of the search failed.*nan"):
        compressor.run(profile(), **arguments)
    assert not (arguments["out"] / STAGE).exists()


def test_a_budget_nobody_meets_ends_before_any_work(profile, arguments):
    with pytest.raises(CompressError, match="no shape in these lists"):
        compressor.run(profile(parameters=0.01), **arguments)
    assert not (arguments["out"] / "search").exists()


def test_a_group_that_divides_no_width_names_the_candidate(profile, arguments):
    path = profile({"quantize.rtn": {"bits": 8, "group": 16}}, "export.safetensors")
    with pytest.raises(CompressError) as caught:
        compressor.run(path, **arguments)
    assert caught.value.what.startswith("candidate l")
    assert "of search.minitron" in caught.value.what and "16" in caught.value.what


def test_a_file_that_goes_while_a_search_is_planned_counts_as_nothing(tmp_path, monkeypatch):
    """A run that is still going moves files of its scratch between a listing and a look at them."""
    (tmp_path / "there.safetensors").write_bytes(b"12345")
    listed = [tmp_path / "gone.safetensors", tmp_path / "there.safetensors"]
    monkeypatch.setattr(type(tmp_path), "rglob", lambda self, pattern: iter(listed))
    assert estimates.tensor_bytes(tmp_path) == 5


def test_the_plan_counts_candidates_and_sums_them(profile, arguments, tmp_path, monkeypatch):
    """Each adds its training and its weights; scores are measured once, or for each if they must.

    One candidate is planned as the same two stages outside a search.
    """
    monkeypatch.setattr(preflight, "matmul_speed", lambda *_: 1e6)  # so that the work counts
    lone = tmp_path / "lone.yaml"
    stages = [{"prune.minitron": {"parameters": 0.7, "samples": 8, "length": 16}}]
    lone.write_text(yaml.safe_dump({"stages": [*stages, {"distill.kd": {"train": TRAIN}}]}))
    prune, train = compressor.plan(lone, **arguments)["stages"]

    def planned(**changes):
        return compressor.plan(profile(**changes), **arguments)["stages"][0]

    few, more, anew = planned(candidates=1), planned(), planned(contiguous=True)
    assert few["candidates"] == 1 and more["candidates"] == 2
    one = prune["seconds"], train["seconds"]
    assert min(one) > 3  # two of them are what any stage takes
    # a search counts its whole budget, a cut what its shape takes of it
    assert few["seconds"] == pytest.approx(sum(one), rel=0.1)
    assert more["seconds"] - few["seconds"] == pytest.approx(one[1], rel=0.1)
    assert anew["seconds"] == pytest.approx(2 * few["seconds"], rel=0.01)
    assert more["disk_bytes"] - few["disk_bytes"] == pytest.approx(more["bytes_out"], rel=0.01)
    total = compressor.inspect(arguments["model"])["parameters"]
    assert more["parameters_out"] == int(0.7 * total)


def test_the_plan_asks_no_disk_for_what_a_stopped_search_left(profile, arguments):
    before = compressor.plan(profile(), **arguments)["stages"][0]
    place = arguments["out"] / "search" / "01" / "01-l3" / "02-distill.kd"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(bytes(50_000))
    after = compressor.plan(profile(), **arguments)["stages"][0]
    assert before["disk_bytes"] - after["disk_bytes"] == 50_000


def test_the_plan_counts_the_process_that_is_timed(profile, arguments):
    given = {"parameters": None, "latency": 0.7}
    once = compressor.plan(profile(), **arguments)["stages"][0]["peak_memory_bytes"]
    timed = compressor.plan(profile(**given), **arguments)["stages"][0]["peak_memory_bytes"]
    assert timed - once == pytest.approx(estimates.PROCESS_BYTES, rel=0.01)


@pytest.mark.parametrize(
    ("given", "bodies", "heads"),
    [
        ({}, 1, 0),
        ({"layer_importance": "perplexity"}, 1 + 3, 3),
        ({"layer_importance": "accuracy"}, 1 + 3 + 1, 3 + 1),
        ({"layer_importance": "output"}, 1 + 3 + 1, 0),
        ({"layer_importance": "output", "contiguous": True, "layers": [3, 1]}, 2 * (1 + 2 + 1), 0),
        ({"layer_importance": "perplexity", "layers": [3]}, 1, 0),
    ],
)
def test_the_plan_counts_the_passes_that_rank_layers(
    profile, arguments, monkeypatch, given, bodies, heads
):
    monkeypatch.setattr(preflight, "matmul_speed", lambda dtype: 1e5)
    rate = 1e5 * estimates.EFFICIENCY[torch.float32]
    wide = {"tolerance": 0.5} | given
    planned = compressor.plan(profile(**wide, samples=108), **arguments)["stages"][0]
    none = compressor.plan(profile(**wide, samples=8), **arguments)["stages"][0]
    found = compressor.inspect(arguments["model"])
    head = found["sizes"]["vocabulary"] * found["sizes"]["hidden"]
    work = 2 * 100 * 16 * (bodies * (found["parameters"] - head) + heads * head)
    assert planned["seconds"] - none["seconds"] == pytest.approx(work / rate, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"bytes": 10_000}, "exactly one of parameters, bytes and latency"),
        ({"method": "distill.nothing"}, "unknown method 'distill.nothing'"),
        ({"method": "prune.minitron"}, "must be a distill method"),
        ({"objective": {"temprature": 2}}, "did you mean temperature"),
        ({"objective": {"train": {}}}, "train stands beside objective"),
    ],
)
def test_mistakes_are_found_when_the_profile_is_read(profile, changes, what):
    with pytest.raises(CompressError) as caught:
        compressor.load_profile(profile(**changes))
    assert what in caught.value.what and caught.value.what.startswith("search.yaml:")


def test_a_baseline_holds_no_search(profile, tmp_path):
    content = yaml.safe_load(profile().read_text())
    content["baselines"] = {"other": content["stages"]}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(CompressError, match="baseline 'other' has a search"):
        compressor.load_profile(tmp_path / "search.yaml")


LOOKS = """\
name: looks
stages:
  - distill.ce: {{train: {{steps: 2, batch: 2, length: 16, {}}}}}
measures: []
"""


def test_without_validation_rows_nothing_is_trained(profile, arguments, monkeypatch, tmp_path):
    corpus = setting.load_corpus

    def without(*given):
        found = corpus(*given)
        return replace(found, documents=found.documents | {"validation": []})

    monkeypatch.setattr(setting, "load_corpus", without)
    with pytest.raises(CompressError, match="cannot be ranked"):
        compressor.run(profile(), **arguments)
    assert not list(arguments["out"].glob("search/01/*-*"))
    looks, arguments = tmp_path / "looks.yaml", {k: v for k, v in arguments.items() if k != "out"}
    looks.write_text(LOOKS.format("validate_every: 1"))
    with pytest.raises(CompressError, match=r"validate_every of distill\.ce has nothing"):
        compressor.plan(looks, **arguments)
    looks.write_text(LOOKS.format(""))
    compressor.plan(looks, **arguments)


def test_several_processes_are_refused(profile, arguments):
    from compressor.run.pipeline import refuse_shared_search

    loaded = compressor.load_profile(profile())
    with pytest.raises(CompressError, match="searches in one process, and torchrun started 2"):
        refuse_shared_search(loaded, arguments["out"], None, 2)
    refuse_shared_search(loaded, arguments["out"], None, 1)
    (arguments["out"] / STAGE).mkdir(parents=True)
    refuse_shared_search(loaded, arguments["out"], None, 2)
    with pytest.raises(CompressError):
        refuse_shared_search(loaded, arguments["out"], 1, 2)


def test_the_report_has_a_table_and_a_chart_with_the_winner_marked(finished):
    rows = rows_of(finished)
    best = next(row for row in rows if row["chosen"])
    text = (finished / "report.md").read_text()
    assert "## Candidates of 01-search.minitron" in text
    for row in rows:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['name']} |"))
        assert f"| {row['after']:.4g} |" in line and ("chosen" in line) == row["chosen"]
    page = (finished / "report.html").read_text()
    assert page.count('class="dot picked"') == 1
    marked = page.partition('class="dot picked"')[0].rpartition("<title>")[2]
    assert marked.startswith(best["name"])


class Said(Silent):
    """A screen that collects its lines."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def fake_latency(monkeypatch, exponent=1.0):
    """Latencies that grow with every size; the list of shapes that were measured."""
    timed = []

    def measured(parent, shape, options, work):
        timed.append(shape)
        per_layer = shape["hidden"] * (shape["heads"] + shape["mlp"] ** exponent)
        return 0.5 + shape["layers"] * per_layer / 1000

    monkeypatch.setattr(search_latency, "measured", measured)
    return timed


LATENCY = {"parameters": None, "latency": 0.6, "tolerance": 0.05, "multiple": 1}


@pytest.mark.parametrize("exponent", [1.0, 1.1])
def test_a_share_of_the_latency_is_met_and_nothing_is_measured_twice(
    profile, arguments, monkeypatch, exponent
):
    timed = fake_latency(monkeypatch, exponent)
    objective, stopped = kd.objective, []

    def interrupted(options, student, teacher):
        if next(student.module.parameters()).device.type == "cpu" and not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        return objective(options, student, teacher)

    monkeypatch.setattr(kd, "objective", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compressor.run(profile(**LATENCY), **arguments)
    stored = json.loads((arguments["out"] / "search" / "01" / "latency.json").read_text())
    assert len(stored["milliseconds"]) == len(timed) > 2
    assert stored["threads"] == 1 and stored["cpu"] == machine()["cpu"]
    known, screen = len(timed), Said()
    home = compressor.run(profile(**LATENCY), **arguments, screen=screen).path
    assert len(timed) == known, "measured again on resume"
    found = read_manifest(home / STAGE).metrics["notes"]["search"]
    for row in found["candidates"]:
        assert abs(row["latency_ms"] / (0.6 * found["latency"]["original_ms"]) - 1) <= 0.05
    assert any(line.startswith("  candidate 1 of 2: 01-") for line in screen.lines)
    assert any("about" in line and line.endswith("left") for line in screen.lines)
    assert "1 row of 16 tokens, 1 thread" in (home / "report.md").read_text()


def test_a_latency_nobody_meets_names_the_nearest_before_any_training(
    profile, arguments, monkeypatch
):
    fake_latency(monkeypatch)
    with pytest.raises(CompressError, match=r"no shape in these lists takes 0\.05") as caught:
        compressor.run(profile(**LATENCY | {"latency": 0.05}), **arguments)
    assert "write latency: 0." in caught.value.hint
    assert not list((arguments["out"] / "search" / "01").glob("01-*"))


def test_latencies_of_another_machine_are_not_mixed_in(profile, arguments, monkeypatch):
    fake_latency(monkeypatch)
    failing(set(range(49)), monkeypatch)
    with pytest.raises(CompressError, match="candidates of the search failed"):
        compressor.run(profile(**LATENCY), **arguments)
    file = arguments["out"] / "search" / "01" / "latency.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cpu": "another"}))
    with pytest.raises(CompressError, match="measured on another machine"):
        compressor.run(profile(**LATENCY), **arguments)


def test_a_real_measurement_grows_with_depth(pico_llama, tmp_path, make_work):
    model = pico_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    model.module.save_pretrained(tmp_path / "wide")
    model.processor.save_pretrained(tmp_path / "wide")
    parent, options = open_source(str(tmp_path / "wide")), Options(latency=0.5, length=16)
    shallow = model.sizes | {"layers": 1, "mlp": 64}
    whole, small = (
        search_latency.measured(parent, shape, options, make_work())
        for shape in (model.sizes, shallow)
    )
    assert 0 < small < whole


def test_an_encoder_is_searched_by_its_representations(pico_bert, text_file, tmp_path, profile):
    model = pico_bert()
    model.module.save_pretrained(tmp_path / "bert")
    model.processor.save_pretrained(tmp_path / "bert")
    path = profile(method="distill.latent", objective={"hidden": 2.0}, tolerance=0.2)
    home = compressor.run(
        path, model=str(tmp_path / "bert"), data=str(text_file), out=tmp_path / "out"
    ).path
    assert compressor.verify(home / STAGE)["ok"]
    own = yaml.safe_load((next((home / "search" / "01").glob("01-*")) / "profile.yaml").read_text())
    assert own["stages"][1]["distill.latent"]["hidden"] == 2.0


def test_an_encoder_decoder_is_searched_in_both_stacks(tmp_path, profile):
    from families import pico

    model = pico("t5", processor=letter_tokenizer())
    model.module.save_pretrained(tmp_path / "t5")
    model.processor.save_pretrained(tmp_path / "t5")
    pairs = [{"source": f"{a} {b}", "target": f"{b} {a}"} for a in "abcdefgh" for b in "ijklmnop"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    path = profile(decoder_layers=[1, 2], heads=[4, 2], tolerance=0.3)
    home = compressor.run(
        path, model=str(tmp_path / "t5"), data=str(tmp_path / "pairs.jsonl"), out=tmp_path / "out"
    ).path
    rows = rows_of(home)
    assert compressor.verify(home / STAGE)["ok"] and len(rows) == 2
    assert all(row["name"].partition("-dl")[2][0] in "12" for row in rows)
