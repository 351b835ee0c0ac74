"""compressor.bench: names, defaults, data, output, and the mistakes that are plausible."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import compressor
from compressor import engines
from compressor.errors import CompressError
from compressor.model.manifest import Manifest, write_manifest
from compressor.run import benchmark
from compressor.run.candidates import find_candidates, short_names
from conftest import character_tokenizer
from families import pico


def saved(model, path):
    model.module.config.architectures = [type(model.module).__name__]
    model.module.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


@pytest.fixture
def decoders(pico_llama, tmp_path):
    a = saved(pico_llama(), tmp_path / "models" / "a")
    b = saved(pico_llama(num_hidden_layers=1), tmp_path / "models" / "b")
    return [str(a), str(b)]


@pytest.fixture
def measured(monkeypatch):
    """Replaces the measuring; returns what it was asked for."""
    asked = []

    def fake(candidates, work, measures, threads, rounds):
        asked.append({"names": [c.name for c in candidates], "measures": list(measures)})
        return {"candidates": []}

    monkeypatch.setattr(benchmark, "measure_candidates", fake)
    return asked


def test_a_bench_without_speed_needs_no_worker_and_leaves_its_report(decoders, text_file, tmp_path):
    out = tmp_path / "out"
    names = ("perplexity", "fidelity")
    found = compressor.bench(decoders, data=str(text_file), measures=names, out=out)
    assert sorted(p.name for p in out.iterdir()) == ["bench.json", "report.html", "report.md"]
    assert json.loads((out / "bench.json").read_text()) == found
    a, b = found["candidates"]
    assert (a["name"], b["name"]) == ("a", "b") and a["latency_ms"] is None
    assert a["quality"]["kl"]["value"] == 0 < b["quality"]["kl"]["value"]
    assert b["ratio"]["bytes"] < 1 and found["noisy"] is False
    assert found["data"]["name"] == "words.txt" and "words.txt" in found["domain"]
    text = (out / "report.md").read_text()
    assert "Against a, b is" in text and "every number is in bench.json" in text
    assert str(tmp_path) not in text + (out / "report.html").read_text()
    again = compressor.compare([out])
    assert again["quality"] == "perplexity" and again["notes"] == [
        "Speed is not compared: out did not measure it."
    ]


def test_the_data_is_that_of_a_run_with_the_same_file(decoders, text_file, tmp_path, chain):
    run = compressor.run(chain, model=decoders[0], data=str(text_file), out=tmp_path / "run")
    found = compressor.bench([decoders[0]], data=str(text_file), measures=["size"])
    record = run.checkpoint.manifest.stages[0].data
    assert record == found["data"]
    assert found["candidates"][0]["fingerprint"] == run.checkpoint.manifest.stages[0].parent
    with pytest.raises(CompressError, match=r"whole run; it holds 01-prune.*04-export") as caught:
        find_candidates([str(run.path)])
    assert caught.value.hint == f"compress bench {run.path}/04-export.safetensors"
    (candidate,) = find_candidates([str(run.path / "04-export.safetensors")])
    assert candidate.name == "run/04-export.safetensors"


def test_defaults_go_by_task(decoders, pico_bert, measured, tmp_path):
    own = ["size", "latency", "memory"]
    compressor.bench(decoders)
    compressor.bench(decoders[:1])
    encoder = str(saved(pico_bert(), tmp_path / "models" / "c"))
    compressor.bench([encoder, encoder])
    classifier = str(saved(pico_bert("sequence-classification"), tmp_path / "models" / "d"))
    compressor.bench([classifier])
    rows = "".join(f"this is the text number {i},{i % 2}\n" for i in range(60))
    (tmp_path / "labelled.csv").write_text(f"text,label\n{rows}")
    compressor.bench([classifier], data=str(tmp_path / "labelled.csv"))
    assert [asked["measures"] for asked in measured] == [
        [*own, "fidelity", "perplexity"],
        [*own, "perplexity"],  # alone there is nothing to be faithful to
        [*own, "fidelity", "batch_sensitivity"],
        own,
        [*own, "accuracy"],
    ]
    assert measured[2]["names"] == ["c (1)", "c (2)"]


@pytest.fixture
def speech(tmp_path):
    """A pico Whisper of random weights, and a table of 24 clips of noise."""
    soundfile = pytest.importorskip("soundfile", reason="reading sound needs soundfile")
    draw, lines = np.random.default_rng(0), ["audio,text"]
    for i in range(24):
        soundfile.write(tmp_path / f"{i}.wav", draw.normal(0, 0.1, 4800), 16000)
        lines.append(f"{i}.wav,this is clip {i}")
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    pico("whisper").module.save_pretrained(tmp_path / "whisper")
    character_tokenizer().save_pretrained(tmp_path / "whisper")
    return {"models": [str(tmp_path / "whisper")], "data": str(tmp_path / "clips.csv")}


def test_images_and_speech_have_theirs(measured, speech, tmp_path):
    draw = np.random.default_rng(0)
    for i in range(24):
        (tmp_path / "images" / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i % 3}" / f"{i}.png")
    pico("vit", num_labels=3).module.save_pretrained(tmp_path / "vit")
    compressor.bench([str(tmp_path / "vit")], data=str(tmp_path / "images"))
    compressor.bench(**speech)
    own = ["size", "latency", "memory"]
    assert [asked["measures"] for asked in measured] == [[*own, "accuracy"], [*own, "wer"]]


def test_the_rate_of_clips_in_a_table(speech):
    """Random weights write no word of it: two held-out clips of four words each, all wrong."""
    found = compressor.bench(**speech, measures=["wer"], set=["wer.batch=1"])
    rate = found["candidates"][0]["quality"]["wer"]
    assert rate["value"] == pytest.approx(1) and rate["n"] == 2
    assert found["measures"]["wer"]["batch"] == 1


def test_built_in_text_is_said(decoders, measured):
    domain = compressor.bench(decoders)["domain"]
    assert "stdlib:pydoc_data.topics" in domain and "no --data was given" in domain


def test_mistakes_end_before_anything_is_measured(decoders, measured, tmp_path):
    def refused(match, *models, **settings):
        with pytest.raises(CompressError, match=match) as caught:
            compressor.bench(models, **settings)
        assert caught.value.hint and not measured

    cores = benchmark.processors()
    refused("does not exist", str(tmp_path / "absent"))
    refused(r"did you mean perplexity\?", *decoders, measures=["perplexty"])
    refused(f"--threads {cores + 1}: this machine gives {cores}", *decoders, threads=cores + 1)
    refused("--threads 0", *decoders, threads=0)
    refused("--rounds 0", *decoders, rounds=0)
    refused("--device tpu: the ONNX Runtime installed here has no such", *decoders, device="tpu")
    refused("data file 'absent.txt' does not exist", *decoders, data="absent.txt")
    refused("nothing to measure")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    refused(r"holds other files \(thesis.tex\)", *decoders, out=tmp_path / "mine")
    refused("is a file", *decoders, out=tmp_path / "mine" / "thesis.tex")
    (tmp_path / "models" / "a" / "model.onnx").write_text("")
    refused("no finished export", *decoders)


def test_an_engine_in_front_of_a_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda module: SimpleNamespace(origin=module))
    for name, engine in (("a", "onnxruntime-genai"), ("b", "transformers")):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, Manifest("artifact", "llama", {}, engine=engine))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    names = [a, f"onnxruntime:{a}", f"openvino:{a}", f"openvino:{a}", b, f"genai:{b}"]
    *fine, other = find_candidates(names)
    assert [c.name for c in fine] == [
        "a",
        "a, onnxruntime",
        *(f"a, openvino ({i})" for i in "12"),
        "b",
    ]
    asked = ["onnxruntime-genai", "onnxruntime", "openvino", "openvino", "transformers"]
    assert [c.engine for c in fine] == asked
    with pytest.raises(CompressError, match="'b' is for transformers; onnxruntime-genai cannot"):
        _ = other.engine
    with pytest.raises(CompressError, match="'a' runs in openvino, and --device cuda is for ONNX"):
        engines.open_engine_of("openvino", tmp_path / "a", device="cuda")
    monkeypatch.setattr(engines, "find_spec", lambda module: None)
    with pytest.raises(CompressError, match="openvino is not installed") as error:
        _ = fine[2].engine
    assert "onnxruntime:" in error.value.hint


def test_a_run_that_finished_nothing_is_explained(tmp_path):
    (tmp_path / "00-source").mkdir()
    with pytest.raises(CompressError, match="finished no stage yet"):
        find_candidates([str(tmp_path)])


def test_short_names_are_unique_and_as_short_as_can_be(tmp_path, monkeypatch):
    for name in ("x/model", "y/model", "z/04-export.onnx"):
        (tmp_path / name).mkdir(parents=True)
    names = [str(tmp_path / n) for n in ("x/model", "y/model", "z/04-export.onnx")]
    assert short_names(names) == ["x/model", "y/model", "z/04-export.onnx"]
    assert short_names(names[:1]) == ["model"]
    assert short_names(["package:some-model", "owner/model"]) == ["some-model", "model"]
    monkeypatch.chdir(tmp_path / "x" / "model")
    assert short_names(["."]) == ["model"]
