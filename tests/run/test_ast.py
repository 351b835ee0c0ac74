"""prune.ast as a stage: what a run leaves, proves and tells of side paths."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

import compressor
from compressor.errors import CompressError
from compressor.model.checkpoint import Checkpoint
from compressor.model.count import count_parameters
from compressor.model.manifest import (
    Manifest,
    WeightFormat,
    list_files,
    read_manifest,
    write_manifest,
)
from compressor.model.saving import save
from compressor.model.side import Side, attach, sides
from compressor.model.sparse import prunable
from compressor.run.card import model_card
from compressor.run.forget import drop_weights
from compressor.run.setting import open_source

TRAIN = "{steps: 10, batch: 2, length: 16, lr: 1.0e-3, warmup: 1, precision: float32}"


@pytest.fixture
def run(llama_folder, text_file, tmp_path):
    """Run stages on a pico Llama."""

    def run(*stages, out="out"):
        profile = tmp_path / "profile.yaml"
        lines = "\n".join(f"  - {stage}" for stage in stages)
        profile.write_text(f"name: sparse\nstages:\n{lines}\nmeasures: []\n")
        given = {"data": str(text_file), "model": str(llama_folder)}
        return compressor.run(profile, out=tmp_path / out, **given)

    return run


def test_a_run_with_side_paths(run, tmp_path):
    stages = (f"distill.kd: {{train: {TRAIN}}}", "quantize.rtn: {bits: 8, group: 16}")
    exports = ("export.safetensors: {}", "export.safetensors: {side: drop}")
    result = run(f"prune.ast: {{side: 16, train: {TRAIN}}}", *stages, *exports)
    first = Checkpoint.open(result.path / "01-prune.ast")
    assert first.manifest.stages[-1].teacher is not None
    notes = first.manifest.metrics["notes"]
    assert {"loss", "flip_rate", "validation", "validation_without_side"} <= notes.keys()
    later = Checkpoint.open(result.path / "02-distill.kd").load()
    for name, side in sides(first.load().module).items():
        assert not torch.equal(side.out_OR, sides(later.module)[name].out_OR)
    last = result.checkpoint.load()
    assert sides(last.module).keys() == first.manifest.formats.keys()
    for name in ("01-prune.ast", "03-quantize.rtn", "04-export.safetensors"):
        checks = {c["name"]: c for c in compressor.verify(result.path / name)["checks"]}
        assert "side.safetensors" in checks and all(c["ok"] for c in checks.values())
    alone = tmp_path / "alone.yaml"
    alone.write_text(f"stages: [{{{stages[1]}}}]\nmeasures: []\n")
    planned = compressor.plan(alone, model=str(result.path / "02-distill.kd"))["stages"][0]
    weights = result.path / "03-quantize.rtn" / "packed.safetensors"
    assert planned["bytes_out"] == weights.stat().st_size
    kept, dropped = (artifact.path for artifact in result.artifacts)
    assert not (dropped / "side.safetensors").exists()
    cards = [(place / "README.md").read_text() for place in (kept, dropped)]
    worth = (notes[key]["after"] for key in ("validation", "validation_without_side"))
    told = "rows after `prune.ast`: {:.4f} with them, {:.4f} without".format(*worth)
    assert all(told in card for card in cards)
    assert "in `side.safetensors`. `compressor.open_engine(DIR)` reads them" in cards[0]
    assert "are left out (`side: drop`)" in cards[1]
    ids = {"input_ids": torch.arange(5, 15)[None], "attention_mask": torch.ones(1, 10).long()}
    plain = AutoModelForCausalLM.from_pretrained(kept).eval().requires_grad_(False)
    found = [compressor.open_engine(place).outputs(ids)["logits"] for place in (kept, dropped)]
    torch.testing.assert_close(plain(**ids).logits, found[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("projection", ["fixed", "trainable"])
def test_preflight_counts_masks_and_side_paths(projection, llama_folder, text_file, tmp_path):
    def planned(stage):
        (tmp_path / "p.yaml").write_text(f"stages: [{stage}]\nmeasures: []\n")
        given = {"model": str(llama_folder), "data": str(text_file), "out": tmp_path / "out"}
        return compressor.plan(tmp_path / "p.yaml", **given)["stages"][0]

    model = open_source(str(llama_folder)).load()
    linears = prunable(model).values()
    for linear_name, linear in prunable(model).items():
        side = torch.zeros(linear.out_features, linear.in_features // 16)
        learned = torch.zeros(side.shape[1], linear.in_features)
        attach(model, linear_name, Side(side, learned if projection == "trainable" else None))
    more = f"side: 16, side_projection: {projection}, "
    with_side, without = (planned(f"prune.ast: {{{m}train: {TRAIN}}}") for m in (more, ""))
    assert with_side["parameters_out"] == count_parameters(model.module)
    assert with_side["disk_bytes"] > without["disk_bytes"]
    plain = planned(f"distill.kd: {{train: {TRAIN}}}")
    masked = sum(linear.weight.numel() for linear in linears)
    assert without["peak_memory_bytes"] - plain["peak_memory_bytes"] == 5 * masked


def test_a_card_says_what_side_paths_are_worth():
    formats = {"a": WeightFormat(side_rank=2), "b": WeightFormat(side_rank=2), "c": WeightFormat()}
    facts = {"agreement": {"logits": 1e-6}, "tolerance": 1e-4, "fidelity": {}, "parameters": 9}
    manifest = Manifest("artifact", "llama", {"id": "x"}, "onnxruntime", [], formats, facts)
    facts["side_losses"] = {"stage": "prune.ast", "with": 2.5, "without": 3.25}
    card = model_card(manifest, "export.onnx", "causal-lm", [])
    assert "side paths of 2 layers are part of the graph" in card
    assert "Loss on validation rows after `prune.ast`: 2.5000 with them, 3.2500 without." in card


def test_what_does_not_fit_is_refused_before_any_work(run, tmp_path):
    for option, what in (("side: 32", "48 inputs"), ('pattern: "1:32"', "48 inputs")):
        with pytest.raises(CompressError, match=what):
            run(f"prune.ast: {{{option}, train: {TRAIN}}}")
        assert not (tmp_path / "out" / "01-prune.ast").exists()


def test_side_paths_go_when_the_weights_of_a_stage_go(pico_llama, tmp_path):
    model = pico_llama()
    attach(model, "model.layers.0.mlp.up_proj", Side(torch.ones(48, 4)))
    save(model, tmp_path, tmp_path)
    manifest = Manifest("checkpoint", "llama", {}, formats=model.formats)
    write_manifest(tmp_path, dataclasses.replace(manifest, files=list_files(tmp_path)))
    assert (tmp_path / "side.safetensors").is_file()
    drop_weights(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert "side.safetensors" not in read_manifest(tmp_path).files
