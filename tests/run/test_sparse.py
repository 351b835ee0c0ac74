"""Zeros that a stage promised hold through every stage after it, or the run stops."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.errors import CompressError, Refused
from compressor.model.checkpoint import Checkpoint
from compressor.model.manifest import list_files, read_manifest, write_manifest
from compressor.model.sparse import broken_promise, prunable
from compressor.quantize import rtn
from compressor.run.card import model_card
from compressor.run.inspect import inspect
from compressor.run.verify import verify
from compressor.screen import Silent
from compressor.training import loop
from compressor.training.snapshot import write_snapshot

TRAIN = "{steps: 3, batch: 2, length: 16, lr: 1.0e-2, warmup: 1, precision: float32}"
SPARSE = "prune.magnitude: {pattern: 2:4}"  # which YAML 1.1 would take for 124
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def run(llama_folder, text_file, tmp_path):
    """Run stages on a pico Llama."""

    def run(*stages, model=llama_folder, out="out", **given):
        profile = tmp_path / "profile.yaml"
        lines = "\n".join(f"  - {stage}" for stage in stages)
        profile.write_text(f"name: sparse\nstages:\n{lines}\nmeasures: []\n")
        given = {"data": str(text_file), **given}
        return compressor.run(profile, model=str(model), out=tmp_path / out, **given)

    return run


FINETUNE = (
    f"distill.ce: {{train: {TRAIN}}}",
    "prune.squarehead: {start: magnitude, sparsity: 0.6, gradual: [0.3], teacher: 'stage:1', "
    "train: {steps: 4, batch: 2, length: 16, warmup: 0, precision: float32, snapshot_seconds: 0}}",
)


class Stopped(Exception):
    """What a killed run is here."""


class Said(Silent):
    """A screen that collects its lines."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def zeros(checkpoint):
    return {name: m.weight == 0 for name, m in prunable(checkpoint.load()).items()}


def test_two_in_four_survives_training_quantization_and_export(run):
    stages = (f"distill.kd: {{train: {TRAIN}}}", "quantize.rtn: {bits: 4, group: 16}")
    result = run(SPARSE, *stages, "export.safetensors: {}")
    sparse = Checkpoint.open(result.path / "01-prune.magnitude")
    trained = Checkpoint.open(result.path / "02-distill.kd")
    before, after = sparse.load(), trained.load()
    for name, linear in prunable(before).items():
        assert torch.equal(linear.weight == 0, after.module.get_submodule(name).weight == 0)
        assert not torch.equal(linear.weight, after.module.get_submodule(name).weight)
    last = result.checkpoint.load()
    assert last.formats and not broken_promise(last, sparse.manifest.formats)
    groups = last.module.get_submodule(next(iter(sparse.manifest.formats))).weight
    assert int((groups != 0).unflatten(1, (-1, 4)).sum(-1).max()) == 2
    dense = result.artifacts[0]
    assert set(dense.manifest.formats) == set(sparse.manifest.formats)
    for place in (sparse.path, trained.path, result.checkpoint.path, dense.path):
        found = {check["name"]: check for check in verify(place)["checks"]}
        assert found["sparsity"]["ok"] and " 2:4 (50" in found["sparsity"]["detail"]
    for engine in ("transformers", "ONNX Runtime"):
        name = "torch" if engine == "transformers" else "onnxruntime"
        metrics = dense.manifest.metrics | {"agreement": {"logits": 0.0}}
        manifest = dataclasses.replace(dense.manifest, engine=name, metrics=metrics)
        card = model_card(manifest, "export", "causal-lm", [])
        assert "2:4 (50" in card and f"{engine}, not faster" in card
        assert ("`verify` does not count them here" in card) == (name == "onnxruntime")
    text = (dense.path / "manifest.json").read_text().replace('"torch"', '"onnxruntime"')
    (dense.path / "manifest.json").write_text(text)
    (check,) = [c for c in verify(dense.path)["checks"] if c["name"] == "sparsity"]
    assert check["detail"].startswith("zeros of ONNX files are not counted")
    report = (result.path / "report.md").read_text()
    assert "01-prune.magnitude, zeros" in report


def test_inspect_counts_what_is_not_zero(run, llama_folder):
    path = run(SPARSE, "export.safetensors: {}").checkpoint.path
    dense = inspect(str(llama_folder))
    model = Checkpoint.open(path).load()
    gone = sum(m.weight.numel() // 2 for m in prunable(model).values())
    for place in (path, path.parent / "02-export.safetensors"):
        found = inspect(str(place))
        assert found["parameters"] == dense["parameters"]
        assert found["nonzero_parameters"] == dense["nonzero_parameters"] - gone
        assert {form["pattern"] for form in found["formats"].values()} == {"2:4"}


def test_a_method_that_refills_zeros_is_stopped_with_exit_3(run, monkeypatch):
    def refill(model, options, work):
        for name, linear in prunable(model).items():
            linear.weight.data[:] = 0.01
            model.formats.pop(name)
        original(model, options, work)

    original = rtn.run
    run(SPARSE)
    monkeypatch.setattr(rtn, "run", refill)
    with pytest.raises(Refused, match=r"quantize\.rtn did not keep the zeros of its par") as caught:
        run(SPARSE, "quantize.rtn: {group: 16}")
    assert caught.value.exit_code == 3 and "layers.0" in caught.value.what


def test_a_method_that_moves_zeros_is_stopped_though_there_are_as_many(run, monkeypatch):
    """As many zeros in every group, in other places."""

    def roll(model, options, work):
        weight = model.module.get_submodule(LAYER).weight
        weight.data = weight.data.unflatten(1, (-1, 4)).roll(1, -1).flatten(1)
        assert not broken_promise(model, model.formats)
        original(model, options, work)

    original = rtn.run
    run(SPARSE)
    monkeypatch.setattr(rtn, "run", roll)
    with pytest.raises(Refused, match=rf"weights of '{LAYER}' that were zero are not"):
        run(SPARSE, "quantize.rtn: {group: 16}")


def test_the_report_says_what_zeros_gain_and_where_pruning_cost_most(run):
    result = run("prune.wanda: {samples: 4, length: 16}", SPARSE)
    text = (result.path / "report.md").read_text()
    assert "02-prune.magnitude is sparse: " in text and "not faster without a sparse kernel" in text
    assert "`compress export DIR/02-prune.magnitude --to safetensors --set packed=true" in text
    rows = [line for line in text.splitlines() if line.startswith("| 01-prune.wanda | model")]
    notes = read_manifest(result.path / "01-prune.wanda").metrics["notes"]["sparsity"]
    worst = sorted(notes, key=lambda name: -notes[name]["estimated_error"])[:5]
    assert [row.split(" | ")[1] for row in rows] == worst


def test_the_report_of_dense_models_and_of_packed_ones_has_nothing_on_zeros(run):
    for stages in (["quantize.rtn: {group: 16}"], [SPARSE, "export.safetensors: {packed: true}"]):
        text = (run(*stages, out=f"out{len(stages)}").path / "report.md").read_text()
        assert "stored like other weights" not in text


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        (
            'prune.magnitude: {pattern: "3:7", undivided: dense}',
            "3:7 divides the inputs of no",
        ),
        ('prune.sparsegpt: {ratios: {"*": 0}}', "ratios leave every layer dense"),
    ],
)
def test_a_stage_that_would_prune_nothing_is_refused_before_work(stage, sentence, run, tmp_path):
    with pytest.raises(CompressError, match=sentence):
        run(stage)
    assert not list(tmp_path.glob("out/0[1-9]*"))


def test_a_manifest_that_promises_zeros_of_no_layer_is_refused(run):
    path = run(SPARSE).checkpoint.path
    manifest = read_manifest(path)
    form = next(iter(manifest.formats.values()))
    formats = manifest.formats | {"model.layers.9.mlp.up_proj": form}
    write_manifest(path, dataclasses.replace(manifest, formats=formats))
    with pytest.raises(CompressError, match=r"'model.layers.9.mlp.up_proj' is not a layer"):
        Checkpoint.open(path).load()
    found = {check["name"]: check for check in verify(path)["checks"]}
    assert not found["sparsity"]["ok"] and "is not a layer" in found["sparsity"]["detail"]


def test_a_parent_with_the_weights_of_another_model_is_refused(run):
    path = run(SPARSE).checkpoint.path
    file = path / "model.safetensors"
    save_file({name: w + 1 for name, w in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(CompressError, match="not as its manifest says: '") as caught:
        run(SPARSE, "quantize.rtn: {group: 16}")
    assert caught.value.exit_code == 2
    failed = {check["name"]: check for check in verify(path)["checks"] if not check["ok"]}
    assert "in a group of 4" in failed["sparsity"]["detail"]


def test_verify_sees_refilled_zeros_of_an_artefact_whose_digests_fit(run):
    path = run(SPARSE, "export.safetensors: {}").artifacts[0].path
    name, file = "model.layers.1.mlp.up_proj", path / "model.safetensors"
    tensors = load_file(file)
    first = tensors[f"{name}.weight"][0, :4]
    assert int((first == 0).sum()) == 2
    first[first == 0] = 1e-12  # too small for the probe to notice
    save_file(tensors, file, {"format": "pt"})
    manifest = read_manifest(path)
    write_manifest(path, dataclasses.replace(manifest, files=list_files(path)))
    (failed,) = [check for check in verify(path)["checks"] if not check["ok"]]
    assert failed["name"] == "sparsity"
    assert failed["detail"].startswith(f"'{name}' has 4 weights in a group of 4")


@pytest.mark.parametrize("cut", ["prune.minitron", "search.minitron"])
def test_what_slices_weights_comes_before_what_leaves_zeros(cut, run, tmp_path, llama_folder):
    train = f", train: {TRAIN}" if cut.startswith("search") else ""
    stage = f"{cut}: {{parameters: 0.5, samples: 8, length: 16{train}}}"
    with pytest.raises(CompressError, match=f"yaml:4: {cut} cannot come after prune.magn") as found:
        run(SPARSE, stage)
    assert "trim first, then sparsify" in found.value.hint
    assert not (tmp_path / "out").exists()
    sparse = run(SPARSE).checkpoint.path
    with pytest.raises(CompressError, match="would break the weight formats of") as found:
        run(stage, model=sparse, out="other")
    assert "trim first" in found.value.hint
    assert not list((tmp_path / "other").glob("01-*"))


def test_a_second_sparse_stage_may_only_add_zeros(run):
    more = "prune.magnitude: {sparsity: 0.6}"
    result = run(SPARSE, more)
    before, after = (zeros(Checkpoint.open(p)) for p in sorted(result.path.glob("0[12]-*")))
    assert all((after[name] | ~before[name]).all() for name in before)


def test_sparse_finetuning_in_a_run_that_was_stopped(run, monkeypatch):
    def stop_in_round_2(folder, state):
        write_snapshot(folder, state)
        if folder.name == "round-2":
            raise Stopped

    whole = run(*FINETUNE, out="whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "write_snapshot", stop_in_round_2)
        run(*FINETUNE)
    result = run(*FINETUNE, screen=(screen := Said()))
    assert "  continuing after step 1 of round-2" in screen.lines
    file = "model.safetensors"
    first, second = (load_file(r.checkpoint.path / file) for r in (whole, result))
    assert all(torch.equal(first[name], second[name]) for name in first)
    tuned = Checkpoint.open(result.path / "01-distill.ce").manifest
    record = result.checkpoint.manifest.stages[-1]
    assert record.teacher == tuned.fingerprint
    assert verify(result.checkpoint.path)["ok"]
    text = (result.path / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    own = [line for line in lines if line["stage"] == "02-prune.squarehead"]
    assert [(line["round"], line["step"]) for line in own] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    with pytest.raises(CompressError, match=r"kl was 0\.0, now 0\.5"):
        run(*FINETUNE, set=["stages.2.kl=0.5"])


def test_what_sparse_finetuning_refuses_is_refused_before_any_work(run, tmp_path):
    trim = "prune.minitron: {sizes: {layers: 2}, samples: 8, length: 16}"
    with pytest.raises(CompressError, match="squarehead compares all layers: the teacher has 3"):
        run(trim, "prune.squarehead: {train: {length: 16}}")
    with pytest.raises(CompressError, match=r"train.length is 500 and the model takes at most"):
        run("prune.squarehead: {train: {length: 500}}")
    with pytest.raises(CompressError, match="does not divide the 48 inputs of '"):
        run('prune.squarehead: {pattern: "16:32", train: {length: 16}}')
    assert not list((tmp_path / "out").glob("01-*"))


def test_preflight_counts_the_training_of_a_pruning_stage(run, tmp_path, llama_folder, text_file):
    def planned(*stages):
        profile = tmp_path / "plan.yaml"
        lines = "\n".join(f"  - {stage}" for stage in stages)
        profile.write_text(f"name: sparse\nstages:\n{lines}\nmeasures: []\n")
        return compressor.plan(profile, str(llama_folder), data=str(text_file))["stages"][0]

    shot, trained = planned("prune.magnitude: {}"), planned(FINETUNE[1].replace("stage:1", "input"))
    plain = planned(f"distill.kd: {{train: {TRAIN}}}")
    for key in ("peak_memory_bytes", "disk_bytes"):
        assert trained[key] >= plain[key] > shot[key]
    masks = planned(f"prune.ast: {{train: {TRAIN}}}")
    assert masks["disk_bytes"] == plain["disk_bytes"] < trained["disk_bytes"]  # it has no rounds
    alone = planned(f"prune.ast: {{kl: 0, train: {TRAIN}}}")
    without = masks["peak_memory_bytes"] - alone["peak_memory_bytes"]
    assert without == 4 * masks["parameters_out"]  # the teacher is the source: as many weights
