"""Options of measures on the command line, measures that do not fit, and what they read."""

import json

import pytest

import compressor
from compressor.errors import CompressError
from compressor.run.measuring import fitting, measure_options, plain_options, refuse_unfit

WORDS = ["stone", "river", "bread", "cloud", "lamp", "ship", "garden", "wolf", "paper", "song"]


def saved(model, path):
    model.module.config.architectures = [type(model.module).__name__]
    model.module.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.csv"
    rows = [f"{' '.join(WORDS[i % 4 : i % 9 + 1])},{WORDS[i % 7]} song,{i % 5}" for i in range(20)]
    path.write_text("sentence1,sentence2,score\n" + "\n".join(rows))
    return path


def test_bench_gives_options_to_measures(pico_bert, pairs, text_file, tmp_path):
    a = saved(pico_bert(), tmp_path / "a")
    b = saved(pico_bert(seed=1), tmp_path / "b")
    found = compressor.bench(
        [str(a), str(b)],
        data=str(text_file),
        measures=["sts", "fidelity"],
        set=[f"sts.pairs={pairs}", "fidelity.rows=8"],
        out=tmp_path / "out",
    )
    for candidate in found["candidates"]:
        spearman = candidate["quality"]["spearman"]
        assert spearman["low"] < spearman["value"] < spearman["high"] and spearman["n"] == 20
    record = found["measures"]["sts"]["pairs"]
    assert record["name"] == "pairs.csv" and len(record["sha256"]) == 64
    assert found["measures"]["fidelity"]["rows"] == 8
    assert "sts is measured on pairs.csv, not on these" in found["domain"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "spearman" in text and " against " in text
    assert str(tmp_path) not in text + json.dumps(found)
    again = compressor.compare([tmp_path / "out"])
    assert again["quality"] == "spearman" and not again["lower_is_better"]


def test_content_of_a_file_counts(pairs):
    options = measure_options(["sts"], [f"sts.pairs={pairs}"])["sts"]
    before = plain_options(options)
    pairs.write_text(pairs.read_text() + "\nx,y,3")
    assert plain_options(options)["pairs"]["sha256"] != before["pairs"]["sha256"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sts.pears=a.csv", r"--set sts.pears=a.csv: unknown option 'pears' .* did you mean pairs"),
        ("sts.batch=0", r"--set sts.batch=0: option 'batch' of measure.sts"),
        ("sts", "--set 'sts' is no MEASURE.OPTION=VALUE"),
        ("wer.rows=3", "wer is not measured here"),
        ("sts.length=64", "option 'pairs' of measure.sts"),
    ],
)
def test_overrides_that_are_wrong(override, said):
    with pytest.raises(CompressError, match=said) as caught:
        measure_options(["sts"], [override])
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "given", "task"),
    [
        ("wer", {}, "speech-seq2seq"),
        ("sts", {"pairs": "absent.csv"}, "feature-extraction"),
        ("retrieval", {"pairs": "absent.csv"}, "feature-extraction"),
        ("batch_sensitivity", {}, "feature-extraction and fill-mask and text-classification"),
    ],
)
def test_what_is_not_for_a_decoder(name, given, task, pico_llama, tmp_path):
    folder = saved(pico_llama(), tmp_path / "a")
    options = measure_options([name], [f"{name}.{key}={value}" for key, value in given.items()])
    with pytest.raises(CompressError, match=f"the measure {name} is for {task}") as caught:
        refuse_unfit(options, folder)
    fit = "accuracy, fidelity, lm_eval, perplexity"
    assert caught.value.hint == f"leave {name} out of measures; these fit: {fit}"
    with pytest.raises(CompressError, match=f"the measure {name} is for"):
        compressor.bench(
            [str(folder)], measures=[name], set=[f"{name}.{k}={v}" for k, v in given.items()]
        )


def test_what_fits_a_task():
    assert fitting("feature-extraction") == ["batch_sensitivity", "fidelity", "retrieval", "sts"]
    assert fitting("speech-seq2seq") == ["accuracy", "fidelity", "perplexity", "wer"]
    assert fitting("image-classification") == ["accuracy", "fidelity"]


def test_a_profile_is_refused_before_any_work(pico_bert, pairs, text_file, tmp_path):
    folder, path = saved(pico_bert(), tmp_path / "a"), tmp_path / "p.yaml"
    text = "name: p\nstages: [export.safetensors]\nmeasures:\n  - sts: {{pairs: {}}}\n"
    given = {"model": str(folder), "data": str(text_file)}
    path.write_text(text.format(pairs))
    compressor.plan(str(path), **given)
    path.write_text(text.format(tmp_path / "absent.csv"))
    with pytest.raises(CompressError, match=r"absent.csv' does not exist"):
        compressor.plan(str(path), **given)
    path.write_text("name: p\nstages: [export.safetensors]\nmeasures: [sts]\n")
    with pytest.raises(CompressError, match=r"p\.yaml:3: option 'pairs' of measure.sts: Field"):
        compressor.plan(str(path), **given)


def test_without_the_library_the_package_is_named(pico_llama, monkeypatch, tmp_path):
    folder = saved(pico_llama(), tmp_path / "a")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = measure_options(["lm_eval"], ["lm_eval.tasks=[arc_easy]"])
    with pytest.raises(CompressError, match="needs the package lm-eval") as caught:
        refuse_unfit(options, folder)
    assert caught.value.hint == "pip install 'compress[lm-eval]'" and caught.value.exit_code == 2
