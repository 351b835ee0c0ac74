"""Tasks of lm-eval through our engines, against lm-eval's own class over transformers (HFLM)."""

import json
import logging

import pytest
import torch

import compressor
from compressor.engines import open_engine
from compressor.errors import CompressError
from compressor.measure import lm_eval
from compressor.measure.interval import estimate
from compressor.model.checkpoint import load_processor

library = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

CHOICE = """\
task: pico_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """\
task: pico_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""
WRITING = """\
task: pico_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{question}}}}"
generation_kwargs: {{until: ["{stop}"], max_gen_toks: {tokens}, do_sample: {sample}}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
NAMES = ("torch", "onnxruntime")


@pytest.fixture(autouse=True)
def calm():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks over 24 records in a folder, data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    records = []
    for i in range(24):
        choices = [str(2 * i), " ".join(["no"] * (1 + i % 3)), "river stone"]
        text = f"Document {i} " + " ".join(f"word{j}" for j in range(i % 7 * 5))
        question = f"What is {i} plus {i}" + "?" * (i % 4)
        records.append({"question": question, "choices": choices, "answer": i % 3, "text": text})
    data = folder / "records.jsonl"
    data.write_text("\n".join(json.dumps(record) for record in records))
    (folder / "choice.yaml").write_text(CHOICE.format(data=data))
    (folder / "rolling.yaml").write_text(ROLLING.format(data=data))
    writing = WRITING.format(data=data, stop="z", tokens=12, sample="false")
    (folder / "writing.yaml").write_text(writing)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pico Llama, {engine: directory}."""
    from conftest import character_tokenizer
    from families import pico

    folder = tmp_path_factory.mktemp("models")
    pico("llama", initializer_range=0.5).module.save_pretrained(folder / "a")
    character_tokenizer().save_pretrained(folder / "a")
    artifact = compressor.export_checkpoint(str(folder / "a"), to="onnx", out=folder / "onnx")
    return {"torch": folder / "a", "onnxruntime": artifact.path}


def options(tasks, *names, **given):
    return lm_eval.Options(tasks=names, include_path=tasks, batch=5, **given)


def ours(folders, name):
    from compressor.measure.lm_eval_model import EngineLM

    engine = open_engine(folders[name])
    assert engine.name == name
    return EngineLM(engine, load_processor(folders[name]), 128, 5)


@pytest.fixture(scope="module")
def reference(folders):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folders["torch"]), device="cpu", batch_size=1, dtype="float32")


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=i)
        for i, given in enumerate(arguments)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_likelihoods_are_those_of_hflm(name, folders, reference):
    pairs = [("The river ", "is wide."), ("", "no context"), ("a", "b"), ("<s>Once", " upon")]
    pairs += [("long " * 40, "and so on" * k) for k in (1, 5)]  # longer than the model takes
    greedy = reference.generate_until(
        requests("generate_until", [("stone", {"until": [], "max_gen_toks": 3})])
    )
    given = requests("loglikelihood", [*pairs, ("stone", greedy[0])])
    found, wanted = (lm.loglikelihood(given) for lm in (ours(folders, name), reference))
    assert [hit for _, hit in found] == [hit for _, hit in wanted]
    assert found[-1][1] and not all(hit for _, hit in found)
    assert [nats for nats, _ in found] == pytest.approx([n for n, _ in wanted], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_rolling_likelihoods_are_those_of_hflm(name, folders, reference):
    texts = [("short",), ("two windows " * 20,), ("five windows, or so. " * 30,), ("x",)]
    given = requests("loglikelihood_rolling", texts)
    found = ours(folders, name).loglikelihood_rolling(given)
    wanted = reference.loglikelihood_rolling(given)
    assert found == pytest.approx(wanted, abs=1e-3, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_of_hflm(name, folders, reference):
    wishes = [{"until": ["z"], "max_gen_toks": 20}, {"until": ["e", "\n"], "max_gen_toks": 9}]
    contexts = ["The river", "a", "Stone and bread " * 12, "<s>cloud", "ship ", "garden wolf"]
    given = requests("generate_until", [(c, wishes[i % 2]) for i, c in enumerate(contexts)])
    found = ours(folders, name).generate_until(given)
    assert found == reference.generate_until(given)
    assert len({len(text) for text in found}) > 2


@pytest.mark.parametrize("name", NAMES)
def test_tasks_score_as_in_lm_eval(name, folders, reference, tasks):
    wanted = library.simple_evaluate(
        model=reference,
        tasks=["pico_choice", "pico_rolling", "pico_writing"],
        num_fewshot=2,
        task_manager=lm_eval._manager(("pico_choice",), tasks),
        bootstrap_iters=0,
    )
    chosen = options(tasks, "pico_choice", "pico_rolling", "pico_writing", fewshot=2)
    lm_eval.check(chosen, folders[name])
    found = lm_eval.run(open_engine(folders[name]), chosen, None)
    scores = wanted["results"]
    for key in ("acc", "acc_norm"):
        assert found[f"pico_choice_{key}"] == scores["pico_choice"][f"{key},none"]
    assert 0 < found["pico_choice_acc"] < 1 and found["pico_choice_acc_n"] == 24
    for key in ("word_perplexity", "bits_per_byte"):
        value = found[f"pico_rolling_{key}"]
        assert value == pytest.approx(scores["pico_rolling"][f"{key},none"], rel=1e-5)
        assert found[f"pico_rolling_{key}_low"] < value < found[f"pico_rolling_{key}_high"]
    assert found["pico_writing_exact_match"] == scores["pico_writing"]["exact_match,none"]
    hits = torch.tensor([s["acc"] for s in wanted["samples"]["pico_choice"]])
    interval = estimate(hits, torch.ones(24), torch.arange(24)).keys("pico_choice_acc")
    assert {key: found[key] for key in interval} == pytest.approx(interval)


def test_the_first_documents_only(folders, tasks):
    found = lm_eval.run(open_engine(folders["torch"]), options(tasks, "pico_choice", limit=6), None)
    assert found["pico_choice_acc_n"] == 6


def test_mistakes_end_before_any_work(folders, tasks, tmp_path):
    def refused(match, given):
        with pytest.raises(CompressError, match=match) as caught:
            lm_eval.check(given, folders["torch"])
        assert caught.value.hint

    refused("is no folder", options(tmp_path / "absent", "pico_choice"))
    (tmp_path / "choice.yaml").write_text(CHOICE.format(data=tmp_path / "absent.jsonl"))
    refused("lm-eval cannot load pico_choice", options(tmp_path, "pico_choice"))


@pytest.mark.parametrize(
    ("sample", "tokens", "said"),
    [("true, temperature: 0.7", 12, "random sampling"), ("false", 128, "generates 128 tokens")],
)
def test_what_an_engine_cannot_do(sample, tokens, said, folders, tasks, tmp_path):
    data = tasks / "records.jsonl"
    text = WRITING.format(data=data, stop="z", tokens=tokens, sample=sample)
    (tmp_path / "writing.yaml").write_text(text)
    with pytest.raises(CompressError, match=said):
        lm_eval.run(open_engine(folders["torch"]), options(tmp_path, "pico_writing"), None)
