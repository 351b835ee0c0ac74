"""Importance scores on disk: left by a stage, reused by another, refused where they do not fit."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from compressor.cli.main import call
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import compressor
from compressor.errors import CompressError
from compressor.model.importance import measure_importance
from compressor.model.importance_file import NAME
from compressor.model.manifest import read_manifest
from compressor.prune import minitron, scores
from compressor.run.loading import load_profile
from compressor.run.preflight import plan_run
from compressor.run.rehearse import rehearse
from compressor.run.setting import Setting, open_source

STAGE = "01-prune.minitron"
GIVEN = "sizes: {{mlp: {mlp}, layers: 2}}, samples: 8, length: 16{more}"


@pytest.fixture
def prune(tmp_path, llama_folder, text_file):
    """Factory: run one pruning stage into a directory and return that of the stage."""

    def run(name, mlp=32, more="", model=llama_folder, redo=None):
        profile = tmp_path / f"{name}.yaml"
        line = GIVEN.format(mlp=mlp, more=more)
        profile.write_text(f"stages: [{{prune.minitron: {{{line}}}}}]\nmeasures: []\n")
        compressor.run(profile, str(model), tmp_path / name, data=str(text_file), redo=redo)
        return tmp_path / name / STAGE

    return run


def test_scores_are_left_beside_the_weights_and_reused_without_a_pass(prune, monkeypatch):
    first = prune("first")
    assert NAME in read_manifest(first).files
    tensors = load_file(first / NAME)
    assert tensors["stacks.0.neurons_LM"].shape == (3, 48)
    assert all(t.dtype == torch.float32 for t in tensors.values())
    monkeypatch.setattr(scores, "measure_importance", None)
    again = prune("again", more=f", scores: '{first}'")
    assert (again / NAME).read_bytes() == (first / NAME).read_bytes()
    assert load_file(again / "model.safetensors").keys()
    for name, tensor in load_file(first / "model.safetensors").items():
        assert torch.equal(tensor, load_file(again / "model.safetensors")[name])


def test_redo_does_not_delete_the_scores_it_is_to_reuse(tmp_path, prune, llama_folder, text_file):
    stage = prune("first")
    profile = tmp_path / "again.yaml"
    line = GIVEN.format(mlp=24, more=f", scores: '{stage}'")
    profile.write_text(f"stages: [{{prune.minitron: {{{line}}}}}]\nmeasures: []\n")
    with pytest.raises(CompressError, match="would delete the scores"):
        compressor.run(profile, str(llama_folder), stage.parent, data=str(text_file), redo=1)
    assert (stage / NAME).is_file()


def test_another_path_with_the_same_content_is_the_same_stage(prune, tmp_path, monkeypatch):
    first = prune("first")
    copy = tmp_path / "elsewhere.safetensors"
    shutil.copy(first / NAME, copy)
    done = prune("again", more=f", scores: '{first}'")
    before = (done / "manifest.json").read_text()
    assert str(tmp_path) not in before
    monkeypatch.setattr(minitron, "run", None)
    prune("again", more=f", scores: '{copy}'")  # finds the stage made
    assert (done / "manifest.json").read_text() == before


def test_a_finished_stage_needs_its_scores_no_more_and_redo_does(prune, monkeypatch):
    first = prune("first")
    line = f", scores: '{first}'"
    done = prune("again", more=line)
    before = (done / "manifest.json").read_bytes()
    shutil.rmtree(first)
    with monkeypatch.context() as patch:
        patch.setattr(minitron, "run", None)
        assert prune("again", more=line) == done
    told = (done.parent / "profile.yaml").read_bytes()
    with pytest.raises(CompressError, match="no importance scores at 'no/such/typo'"):
        prune("again", more=", scores: no/such/typo")
    assert (done.parent / "profile.yaml").read_bytes() == told
    assert (done / "manifest.json").read_bytes() == before
    with pytest.raises(CompressError, match="mlp was 32, now 24"):
        prune("again", mlp=24, more=line)
    for name, redo in (("again", 1), ("new", None)):
        with pytest.raises(CompressError, match="no importance scores at"):
            prune(name, more=line, redo=redo)
    assert (done / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (", scores: absent", "no importance scores at 'absent'"),
        (", scores: SCORES, sequence_aggregation: l2", "measured with sequence_aggregation: mean"),
        (", scores: SCORES, layer_importance: output", "layer_importance: block_influence"),
    ],
)
def test_scores_that_cannot_serve_are_refused_before_work(prune, more, sentence, monkeypatch):
    first = prune("first")
    monkeypatch.setattr(minitron, "run", None)
    with pytest.raises(CompressError, match=sentence):
        prune("again", more=more.replace("SCORES", f"'{first}'"))


def test_scores_of_another_shape_name_the_axis(prune, pico_llama, tmp_path):
    first = prune("first", mlp=48)
    for axis, size in {"mlp": 40, "hidden": 64, "layers": 2}.items():
        key = {"mlp": "intermediate_size", "hidden": "hidden_size", "layers": "num_hidden_layers"}
        other = pico_llama(**{key[axis]: size})
        folder = tmp_path / axis
        other.module.save_pretrained(folder)
        other.processor.save_pretrained(folder)
        profile = tmp_path / "p.yaml"
        line = f"sizes: {{heads: 2}}, samples: 8, length: 16, scores: '{first}'"
        profile.write_text(f"stages: [{{prune.minitron: {{{line}}}}}]\nmeasures: []\n")
        with pytest.raises(CompressError, match=f"{axis} is .* there and {size} here"):
            rehearse(load_profile(profile), open_source(str(folder)))


def test_scores_of_other_weights_of_the_same_shape_are_refused(pico_llama, make_work, tmp_path):
    def options(**given):
        return minitron.Options(sizes={"mlp": 32}, samples=8, length=16, **given)

    model, other = pico_llama(), pico_llama()
    minitron.run(model, options(), make_work())
    model.beside[NAME].write(tmp_path / NAME)
    minitron.run(pico_llama(), options(scores=str(tmp_path)), make_work())
    with torch.no_grad():  # one step of one weight is another model
        weight = other.module.model.layers[1].mlp.up_proj.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(2.0))
    before = other.module.state_dict()["model.embed_tokens.weight"].clone()
    with pytest.raises(CompressError, match="measured on other weights") as caught:
        minitron.run(other, options(scores=str(tmp_path)), make_work())
    assert "leave scores out" in caught.value.hint and other.sizes["mlp"] == 48
    assert torch.equal(other.module.state_dict()["model.embed_tokens.weight"], before)


def test_a_calibration_that_is_too_short_says_what_to_write(tmp_path, llama_folder, text_file):
    told = {}
    for samples in (8, 100_000):
        line = f"sizes: {{mlp: 32}}, length: 16, samples: {samples}"
        (tmp_path / "p.yaml").write_text(
            f"stages: [{{prune.minitron: {{{line}}}}}]\nmeasures: []\n"
        )
        profile = replace(load_profile(tmp_path / "p.yaml"), data={"train": [str(text_file)]})
        said, logged = [], []
        screen = SimpleNamespace(say=said.append)
        setting = Setting(
            profile, open_source(str(llama_folder)), tmp_path / "o", screen, logged.append
        )
        plan_run(setting)
        assert said == logged
        told[samples] = said
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    train = setting.corpus.documents["calibration"]
    tokens = sum(len(tokenizer(d.text).input_ids) + 1 for d in train)  # a document ends with eos
    rows = tokens // 16
    assert told == {
        8: [],
        100_000: [
            f"calibration has {rows:,} of the 100,000 sequences asked for: "
            f"give more text or write samples: {rows}"
        ],
    }


@pytest.mark.parametrize("chain", ["stages", "baselines"])
@pytest.mark.parametrize(
    ("method", "reads"),
    [
        ("prune.minitron: {sizes: {mlp: 32}, length: 120}", True),
        ("prune.wanda: {length: 120}", True),
        ("prune.squarehead: {length: 120, train: {length: 16}}", True),
        ("prune.squarehead: {length: 120, start: magnitude, train: {length: 16}}", False),
        ("prune.magnitude: {}", False),
    ],
)
def test_data_that_is_missing_is_missed_before_any_work(
    chain, method, reads, tmp_path, llama_folder
):
    def prepared(data):
        stages = f"[{{{method}}}, quantize.rtn: {{group: 16}}]"
        baseline = f"stages: [quantize.rtn: {{group: 16}}]\nbaselines: {{a: {stages}}}"
        text = f"stages: {stages}" if chain == "stages" else baseline
        (tmp_path / "p.yaml").write_text(f"{text}\nmeasures: []\n")
        profile = replace(load_profile(tmp_path / "p.yaml"), data=data)
        screen = SimpleNamespace(say=lambda text: None)
        source = open_source(str(llama_folder))
        return plan_run(Setting(profile, source, tmp_path / "o", screen, lambda text: None))

    (tmp_path / "train.txt").write_text("\n\n".join(f"stone {i} river" * 20 for i in range(40)))
    (tmp_path / "few.txt").write_text("too few")
    data = {name: [str(tmp_path / f"{name}.txt")] for name in ("train", "few")}
    scarce = {"train": data["train"], "calibration": data["few"]}
    name = method.partition(":")[0]
    if reads:
        with pytest.raises(CompressError, match=f"{name} reads calibration .* of 120 tokens, and"):
            prepared(scarce)
    else:
        prepared(scarce)
    if name != "prune.magnitude":
        with pytest.raises(CompressError, match=f"{name} needs data and the profile names none"):
            prepared({})
    prepared({"train": data["train"]})


def test_a_ranking_by_removal_needs_scores_that_removed_layers(pico_llama, make_work, tmp_path):
    def options(**given):
        return minitron.Options(samples=8, layer_importance="perplexity", **given)

    model = pico_llama()
    minitron.run(model, options(sizes={"mlp": 32}), make_work())
    model.beside[NAME].write(tmp_path / NAME)
    with pytest.raises(CompressError, match="remove 0 layers of layers, and 1 are to go"):
        given = options(sizes={"layers": 2}, scores=str(tmp_path))
        minitron.run(pico_llama(), given, make_work())
    minitron.run(pico_llama(), options(sizes={"heads": 2}, scores=str(tmp_path)), make_work())


def test_what_is_no_file_of_scores_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CompressError, match="does not say what it holds"):
        compressor.inspect(str(tmp_path / "a.safetensors"), importance=True)
    save_file({"a": torch.zeros(1)}, tmp_path / NAME, {"about": "{}"})
    with pytest.raises(CompressError, match="holds no importance scores"):
        compressor.inspect(str(tmp_path), importance=True)


def test_inspect_shows_every_score(make_work, tmp_path, capsys):
    from families import pico, random_inputs

    model = pico("t5")
    batches = [random_inputs(model)]
    work = make_work()
    object.__setattr__(work, "_batches", lambda *args, **shape: batches)
    given = minitron.Options(sizes={"layers": 1, "heads": 2}, samples=3, contiguous=True)
    wanted = measure_importance(pico("t5"), batches)
    minitron.run(model, given, work)
    model.beside[NAME].write(tmp_path / NAME)
    found = json.loads(json.dumps(compressor.inspect(str(tmp_path), importance=True)))
    encoder, decoder = found["stacks"]
    assert encoder["blocks"] == "encoder.block" and decoder["cross_heads"] is not None
    assert len(encoder["windows"]) == 2 and decoder["windows"] is None
    assert encoder["neurons"] == wanted.stacks[0].neurons_LM.tolist()
    assert found["hidden"] == wanted.hidden_D.tolist()
    assert found["settings"]["samples"] == 3
    assert call(["inspect", str(tmp_path), "--importance"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for title in ("encoder.block: layers", "windows of 2 layers", "cross attention", "neurons"):
        assert title in shown


def test_a_model_without_predictions_names_the_ranking_that_works(pico_bert, tmp_path):
    model = pico_bert()
    model.module.save_pretrained(tmp_path / "m")
    model.processor.save_pretrained(tmp_path / "m")
    for ranking in ("perplexity", "accuracy"):
        line = f"sizes: {{layers: 2}}, length: 16, layer_importance: {ranking}"
        (tmp_path / "p.yaml").write_text(
            f"stages: [{{prune.minitron: {{{line}}}}}]\nmeasures: []\n"
        )
        with pytest.raises(CompressError, match="predicts tokens or labels") as error:
            rehearse(load_profile(tmp_path / "p.yaml"), open_source(str(tmp_path / "m")))
        assert "layer_importance: output" in error.value.hint
