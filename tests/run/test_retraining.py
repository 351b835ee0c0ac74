"""Minitron's retraining as whole runs: a corrected teacher, before or alongside; kept logits."""

import pytest
import torch
from safetensors.torch import load_file

import compressor
from compressor.errors import CompressError
from compressor.model.manifest import read_manifest
from compressor.run.loading import load_profile
from compressor.run.preflight import plan
from compressor.run.rehearse import rehearse
from compressor.run.setting import open_source
from compressor.training import loop

TRAIN = "train: {steps: 4, batch: 2, length: 16, lr: 1.0e-3, warmup: 1, precision: float32"
PRUNE = "- prune.minitron: {sizes: {layers: 2, mlp: 32}, samples: 8, length: 16}"


@pytest.fixture
def go(llama_folder, text_file, tmp_path):
    """Factory: run or plan these stages on the pico Llama."""

    def run(*stages, out="out", do=compressor.run, **given):
        profile = tmp_path / "p.yaml"
        profile.write_text("\n".join(["stages:", *stages, "measures: []"]))
        found = {"model": str(llama_folder), "data": str(text_file), "out": tmp_path / out}
        return do(profile, **found | given)

    return run


def retrain(*options):
    """A distill.minitron stage with these options."""
    return f"- distill.minitron: {{{', '.join([TRAIN + '}', *options])}}}"


def test_a_teacher_corrected_first_teaches_the_pruned_model(go):
    fine_tuned = f"- distill.ce: {{{TRAIN}}}}}"
    learned = retrain("teacher: 'stage:1'", "intermediate: on")
    home = go(fine_tuned, PRUNE, learned).path
    manifests = [read_manifest(home / name) for name in ("01-distill.ce", "03-distill.minitron")]
    assert manifests[1].stages[-1].teacher == manifests[0].fingerprint
    found = manifests[1].metrics["notes"]["validation"]
    assert found["after"] < found["before"] and found["rows"] > 0
    assert "validation loss" in (home / "report.md").read_text()
    lines = (home / "metrics.jsonl").read_text()
    for part in ("logits", "block output", "embeddings", "alpha"):
        assert f'"{part}"' in lines


def test_a_killed_correction_goes_on_with_the_same_bits_and_never_writes_the_teacher(
    go, pico_llama, tmp_path, monkeypatch
):
    teacher = tmp_path / "teacher"
    model = pico_llama(seed=3)
    model.module.save_pretrained(teacher)
    model.processor.save_pretrained(teacher)
    before = {file: file.read_bytes() for file in teacher.iterdir()}
    stages = [PRUNE, retrain("correct_teacher: {lr: 1.0e-4}")]
    stages[1] = stages[1].replace("float32}", "float32, snapshot_seconds: 0}")
    straight = go(*stages, out="a", teacher=str(teacher)).path
    write = loop.write_snapshot

    def stop(folder, state):
        write(folder, state)
        if state.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_snapshot", stop)
        with pytest.raises(KeyboardInterrupt):
            go(*stages, out="b", teacher=str(teacher))
    resumed = go(*stages, out="b", teacher=str(teacher)).path
    assert "resuming after step 2" in (resumed / "log.txt").read_text()
    name = "02-distill.minitron"
    mine, theirs = (load_file(home / name / "model.safetensors") for home in (straight, resumed))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    notes = [read_manifest(home / name).metrics["notes"] for home in (straight, resumed)]
    assert notes[0]["validation"] == notes[1]["validation"]
    assert {file: file.read_bytes() for file in teacher.iterdir()} == before


def test_a_run_with_kept_logits(go):
    home = go(PRUNE, retrain("top_k: 8")).path
    log = (home / "log.txt").read_text()
    assert "distill.minitron: top_k is 8: Minitron (arXiv 2407.14679) found worse" in log
    assert "teacher outputs take" in log
    assert not list(home.glob("**/teacher-outputs.bin"))


def test_preflight_counts_a_moving_teacher_and_kept_logits(go):
    def needs(*options):
        return go(PRUNE, retrain(*options), do=plan)["stages"][1]

    plain, moving, kept = needs(), needs("correct_teacher: {}"), needs("top_k: 8")
    weights = whole_parameters(go)
    activations = 2 * 16 * 32 * 3 * 180  # rows, length, hidden, layers, bytes
    assert moving["peak_memory_bytes"] - plain["peak_memory_bytes"] == 12 * weights + activations
    assert moving["disk_bytes"] - plain["disk_bytes"] == 24 * weights
    tokens, states = 4 * 2 * 16, 2 * 2 * 32
    assert kept["disk_bytes"] - plain["disk_bytes"] == tokens * (8 * 4 + states)
    off = needs("top_k: 8", "intermediate: off")
    assert off["disk_bytes"] - plain["disk_bytes"] == tokens * 8 * 4


def whole_parameters(go):
    """Parameters of the unpruned model, as preflight counts them."""
    return go("- quantize.rtn: {group: 16}", do=plan)["stages"][0]["parameters_out"]


def test_what_the_options_exclude_is_said_before_work(llama_folder, tmp_path):
    profile = tmp_path / "p.yaml"
    profile.write_text("stages: [{distill.kd: {top_k: 8, correct_teacher: {}}}]\nmeasures: []\n")
    with pytest.raises(CompressError, match="top_k asks the teacher once"):
        rehearse(load_profile(profile), open_source(str(llama_folder)))
