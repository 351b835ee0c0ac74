"""bench: the JSON form, ratios, noise, and workers that die."""

import dataclasses
import json
import os
import signal

import pytest

from compressor.engines import GGUF, installed
from compressor.errors import CompressError
from compressor.measure import latency
from compressor.measure.process import Worker
from compressor.run.bench import measure_candidates
from compressor.run.candidates import PREFIXES, Candidate, find_candidates
from compressor.run.rounds import SPREAD, TWICE, Turns, order
from compressor.run.standalone import export_checkpoint

KEYS = {"version", "machine", "threads", "rounds", "noisy", "candidates"}
CANDIDATE = {"name", "path", "engine", "parameters", "bytes", "peak_memory_bytes", "latency_ms"}
CANDIDATE |= {"throughput", "quality", "ratio"}
QUICK = latency.Options(batches=(1, 2), prompts=(8, 64), length=16, tokens=4, seconds=0.05)


def saved(model, path):
    model.module.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


@pytest.fixture
def encoders(pico_bert, tmp_path):
    # a good deal more layers than one, for a machine that other work shares
    a = saved(pico_bert(num_hidden_layers=8), tmp_path / "a")
    b = saved(pico_bert(num_hidden_layers=1), tmp_path / "b")
    return [Candidate("original", a), Candidate("the same", a), Candidate("smaller", b)]


def test_bench_gives_the_json_form_and_honest_ratios(encoders, make_work):
    measures = {"latency": QUICK, "memory": None, "fidelity": None}
    work = make_work()
    found = measure_candidates(encoders, work, measures, rounds=3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found.keys() >= KEYS and found["rounds"] == 3 and found["threads"] == 1
    for candidate in found["candidates"]:
        assert candidate.keys() >= CANDIDATE and candidate["engine"] == "torch"
        assert candidate["throughput"]["unit"] == "sentences/s"
        assert list(candidate["batches"]) == ["1", "2"] and candidate["prefill_ms"] is None
        assert candidate["batches"]["2"]["throughput"] == candidate["throughput"]["value"]
        assert candidate["latency_ms"].keys() >= {"p50", "p95", "iqr"}
        assert len(candidate["latency_ms"]["rounds"]) == 3
        assert candidate["quality"]["cosine"].keys() == {"value", "low", "high", "n"}
        assert not candidate["path"].startswith("/")
    original, same, smaller = found["candidates"]
    assert original["ratio"]["latency"] == 1 and original["ratio"]["bytes"] == 1
    assert same["ratio"]["latency"] == pytest.approx(1, abs=0.5)
    assert same["ratio"]["bytes"] == 1 and same["quality"]["cosine"]["value"] == pytest.approx(1)
    assert smaller["ratio"]["bytes"] < 1 and smaller["ratio"]["latency"] < 1
    assert smaller["parameters"] < original["parameters"]
    assert smaller["ratio"]["peak_memory"] == pytest.approx(1, abs=0.1)
    assert not list(work.scratch.iterdir())  # reference outputs and texts are gone


def test_a_decoder_is_timed_per_token(pico_llama, make_work, tmp_path):
    path = saved(pico_llama(), tmp_path / "a")
    measures = {"latency": QUICK, "perplexity": None}
    found = measure_candidates([Candidate("a", path)], make_work(), measures, rounds=2)[
        "candidates"
    ][0]
    assert found["throughput"]["unit"] == "tokens/s" and found["batches"] is None
    assert list(found["prefill_ms"]) == ["8", "64"] and min(found["prefill_ms"].values()) > 0
    assert found["quality"]["perplexity"]["low"] < found["quality"]["perplexity"]["high"]
    assert found["peak_memory_bytes"] is None and found["ratio"]["peak_memory"] is None


def test_one_graph_in_every_engine_that_is_installed(pico_llama, make_work, tmp_path):
    path = saved(pico_llama(num_hidden_layers=1), tmp_path / "a")
    out = export_checkpoint(str(path), to="genai", out=tmp_path / "out").path
    there = [p for p, name in PREFIXES.items() if name not in GGUF and installed(name)]
    candidates = find_candidates([str(path), *(f"{prefix}:{out}" for prefix in there)])
    measures = {"latency": QUICK, "memory": None, "fidelity": None}
    found = measure_candidates(candidates, make_work(), measures, rounds=1)["candidates"]
    assert [c["engine"] for c in found] == ["torch", *(PREFIXES[prefix] for prefix in there)]
    assert [c["name"] for c in found] == ["a", *(f"out, {prefix}" for prefix in there)]
    for candidate in found[1:]:
        assert candidate["quality"]["kl"]["value"] < 1e-6
        assert candidate["quality"]["top1_agreement"]["value"] == 1
        assert candidate["throughput"]["value"] > 0 and candidate["prefill_ms"]["8"] > 0
        assert candidate["peak_memory_bytes"] > candidate["baseline_bytes"] > 0
        assert candidate["parameters"] == found[0]["parameters"]


def test_without_speed_there_is_no_noise(encoders, make_work):
    found = measure_candidates(encoders[:1], make_work(), ["size"])
    assert found["noisy"] is False and found["candidates"][0]["latency_ms"] is None
    assert found["candidates"][0]["ratio"]["latency"] is None


def turns_of(first, second, *others, cores=1.0, threads=1):
    """Turns with these p50; the last candidate has `cores`, the others all that they can use."""

    def rounds(values, share):
        return [{"p50": v, "cores": share} for v in values]

    *all_but_one, last = (first, *others)
    found = [*(rounds(v, float(threads)) for v in all_but_one), rounds(last, cores)]
    return Turns(found, rounds(second, float(threads)), threads)


def test_noise_is_a_first_candidate_that_disagrees_with_itself():
    calm = turns_of([10, 10.1, 9.9], [10, 10.05, 10])
    assert calm.noise["twice"] < TWICE and calm.noise["spread"] < SPREAD and not calm.noisy
    apart = turns_of([10, 10, 10], [11, 11, 11])
    assert apart.noise["twice"] > TWICE and apart.noisy
    spread = turns_of([10, 14, 8, 12], [10, 14, 8, 12])
    assert spread.noise["spread"] > SPREAD and spread.noisy


def test_noise_is_any_candidate_whose_rounds_lie_apart_or_that_got_too_little_of_a_processor():
    first = [10, 10, 10, 10]
    calm = turns_of(first, first, [5, 5.1, 5, 4.9], cores=0.9)
    assert calm.noise["share"] == 0.9 and not calm.noisy
    apart = turns_of(first, first, [5, 5, 5, 5], [5, 7, 4, 6])
    assert apart.noise["spread"] == pytest.approx((6.25 - 4.75) / 5.5) and apart.noisy
    starved = turns_of(first, first, [0.34] * 4, cores=0.25)
    assert starved.noise["spread"] == 0 and starved.noise["share"] == 0.25 and starved.noisy
    assert turns_of(first, first, [5] * 4, cores=1.0, threads=2).noisy
    assert not turns_of(first, first, [5] * 4, cores=1.8, threads=2).noisy


def test_a_ratio_is_formed_within_a_round():
    """The machine halves its speed after the first round; the ratio does not see it."""
    first, ours = [10.0, 20.0, 20.0], [5.0, 10.0, 10.0]
    found = turns_of(first, first, ours)
    assert found.latency_ratio(1) == 0.5 and found.latency_ratio(0) == 1
    assert Turns([[], []], []).latency_ratio(1) is None


def test_every_candidate_takes_every_place():
    orders = [order(number, 4) for number in range(4)]
    assert sorted(map(tuple, zip(*orders, strict=True))) == sorted(map(tuple, orders))
    assert all(sorted(found) == [0, 1, 2, 3] for found in orders)


def test_a_worker_killed_in_mid_run_is_one_sentence(encoders, make_work, monkeypatch):
    turns = []
    ask = Worker.ask

    def kill_later(self, request):
        turns.append(self.process.pid)
        if len(turns) == 4:
            os.kill(self.process.pid, signal.SIGKILL)
        return ask(self, request)

    monkeypatch.setattr(Worker, "ask", kill_later)
    with pytest.raises(CompressError, match=r"measuring '.*' died: .*memory ran out") as caught:
        measure_candidates(encoders[:2], make_work(), {"latency": QUICK}, rounds=3)
    assert caught.value.hint
    for pid in set(turns):  # nobody is left behind
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_mistakes_are_refused_before_anything_is_timed(encoders, pico_llama, make_work, tmp_path):
    other = Candidate("llama", saved(pico_llama(), tmp_path / "c"))
    with pytest.raises(CompressError, match="'llama' is for causal-lm and 'original' for"):
        measure_candidates([encoders[0], other], make_work(), ["size"])
    pico_llama().processor.save_pretrained(encoders[2].path)
    with pytest.raises(CompressError, match="different tokenizers"):
        measure_candidates([encoders[0], encoders[2]], make_work(), ["size"])
    with pytest.raises(CompressError, match="no directory"):
        measure_candidates([Candidate("x", tmp_path / "absent")], make_work(), ["size"])
    with pytest.raises(CompressError, match="unknown method"):
        measure_candidates(encoders, make_work(), ["speed"])
    with pytest.raises(CompressError, match="nothing to measure"):
        measure_candidates([], make_work())
    unfit = dataclasses.replace(encoders[0], name="encoder")
    with pytest.raises(CompressError, match="no causal language model"):
        measure_candidates([unfit], make_work(), ["latency", "perplexity"])
