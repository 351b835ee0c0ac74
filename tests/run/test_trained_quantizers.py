"""quantize.distilled and quantize.differentiable as stages of whole runs."""

import json

import pytest
import torch

import compressor
from compressor.errors import CompressError
from compressor.model.checkpoint import Checkpoint
from compressor.model.sparse import broken_promise
from compressor.model.tables import QuantTable
from compressor.run.preflight import plan

TRAIN = "train: {steps: 3, batch: 2, length: 16, lr: 1.0e-3, warmup: 1, precision: float32}"


@pytest.fixture
def run(tmp_path):
    """Run stages on a model folder."""

    def run(model, data, *stages):
        path = tmp_path / "p.yaml"
        lines = "\n".join(f"  - {stage}" for stage in stages)
        path.write_text(f"name: trained\nstages:\n{lines}\nmeasures: [size]\n")
        return compressor.run(path, model=str(model), data=str(data), out=tmp_path / "out")

    return run


@pytest.mark.parametrize(
    "stage",
    [
        "quantize.distilled: {bits: 2, group: 16, steps: learned, ",
        "quantize.differentiable: {bits: 4, bucket: flat, group: 256, alternate: 1, ",
    ],
)
def test_a_decoder(stage, run, llama_folder, text_file):
    result = run(llama_folder, text_file, f"{stage}{TRAIN}}}")
    model, manifest = result.checkpoint.load(), result.checkpoint.manifest
    notes = manifest.metrics["notes"]
    assert manifest.stages[-1].teacher is not None
    assert {"loss", "validation", "size"} <= notes.keys() and notes["validation"]["rows"] > 0
    tables = [m for m in model.module.modules() if isinstance(m, QuantTable)]
    assert len(tables) == len(manifest.formats) == 3 * 7 + 2  # embedding and head, which share
    assert model.module.lm_head.codes_OI is model.module.model.embed_tokens.codes_OI
    assert all(torch.isfinite(table.weight).all() for table in tables)
    files = set(result.checkpoint.path.glob("*.safetensors"))
    files -= {result.checkpoint.path / "probe.safetensors"}
    stored = sum(f.stat().st_size for f in files)
    assert 0 < stored - notes["size"]["stored_bytes"] < 10_000  # the header of the file
    again = run(llama_folder, text_file, f"{stage}{TRAIN}}}")
    assert again.checkpoint.manifest.fingerprint == manifest.fingerprint


@pytest.mark.parametrize(
    "stage",
    [
        "quantize.distilled: {bits: 4, group: 16, ",  # in the layout of compressed-tensors
        "quantize.distilled: {bits: 2, bucket: flat, group: 256, rounding: stochastic, ",
        "quantize.differentiable: {bits: 3, group: 16, allocation: gradient, ",
    ],
)
def test_a_classifier(stage, run, pico_bert, tmp_path):
    model, folder = pico_bert("sequence-classification"), tmp_path / "model"
    model.module.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    lines = [f"{'good' if i % 2 else 'bad'} day number {i},{i % 2}" for i in range(120)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(lines))
    result = run(folder, tmp_path / "rows.csv", f"{stage}{TRAIN}, embeddings: false, head: false}}")
    formats = result.checkpoint.manifest.formats
    assert "bert.pooler.dense" in formats and "classifier" not in formats
    assert not any("embeddings" in name for name in formats)
    ids = {"input_ids": torch.arange(5, 15)[None], "attention_mask": torch.ones(1, 10).long()}
    engine = compressor.open_engine(result.checkpoint.path)
    assert torch.isfinite(engine.outputs(ids)["logits"]).all()


@pytest.mark.parametrize(
    "quantize",
    [
        "quantize.distilled: {bits: 4, group: 16, teacher: input, ",
        "quantize.differentiable: {bits: 3, group: 16, scaling: absmax, teacher: input, ",
    ],
)
def test_a_smaller_sparse_student_of_the_input(quantize, run, llama_folder, text_file):
    stages = (
        "prune.minitron: {sizes: {mlp: 32, layers: 2}, samples: 8, length: 16}",
        'prune.magnitude: {pattern: "2:4"}',
        f"{quantize}{TRAIN}}}",
        "export.safetensors: {}",
    )
    result = run(llama_folder, text_file, *stages)
    sparse = Checkpoint.open(result.path / "02-prune.magnitude").manifest.formats
    assert len(sparse) == 14 and not broken_promise(result.checkpoint.load(), sparse)
    assert json.loads((result.path / "report.json").read_text())["stages"][2]["notes"]["size"]


@pytest.mark.parametrize(
    ("stage", "what"),
    [
        ("quantize.distilled: {group: 10}", "group 10 does not divide the 32 inputs"),
        ("quantize.differentiable: {group: 10}", "group 10 does not divide the 32 inputs"),
        ("quantize.distilled: {bucket: flat}", "linear scaling has no point at 0"),
        ("quantize.differentiable: {group: 16}", "linear scaling has no point at 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    stage, what, run, llama_folder, text_file, tmp_path
):
    with pytest.raises(CompressError, match=what):
        run(llama_folder, text_file, "prune.magnitude: {sparsity: 0.5}", stage)
    assert not (tmp_path / "out" / "01-prune.magnitude").exists()


def test_a_teacher_may_be_quantized(llama_folder, text_file, tmp_path):
    """NF4 once, then named as the teacher: it is taken as it is, and planned as light as it is."""
    light = tmp_path / "light.yaml"
    light.write_text("name: light\nstages: [{quantize.nf4: {group: 16}}]\nmeasures: []\n")
    teacher = compressor.run(light, model=str(llama_folder), out=tmp_path / "teacher").checkpoint
    recipe = tmp_path / "kd.yaml"
    recipe.write_text(f"name: kd\nstages: [{{distill.kd: {{{TRAIN}}}}}]\nmeasures: []\n")
    given = {"model": str(llama_folder), "data": str(text_file)}
    found = compressor.run(recipe, **given, teacher=str(teacher.path), out=tmp_path / "out")
    assert found.checkpoint.manifest.stages[-1].teacher == teacher.manifest.fingerprint
    # at step 0 student and float teacher are one; from this teacher there is something to learn
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] > 1e-4
    peaks = [plan(recipe, **given, teacher=t) for t in (str(llama_folder), str(teacher.path))]
    heavy, lighter = (p["stages"][0]["peak_memory_bytes"] for p in peaks)
    saved = (4 - 1.25) * found.checkpoint.manifest.metrics["parameters"]
    assert heavy - lighter == pytest.approx(saved, rel=0.1)
