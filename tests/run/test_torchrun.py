"""Two processes train what one process trains, and one that fails does not leave the other."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import compressor
from compressor.errors import CompressError
from compressor.model.manifest import read_manifest
from compressor.training.parallel import Team, refuse_uneven

PROFILE = """\
name: pair
stages:
  - prune.minitron: {sizes: {mlp: 32, layers: 2}, samples: 8, length: 16}
  - distill.kd: {train: &train {steps: 10, batch: 4, length: 16, lr: 1.0e-3, warmup: 1,
      accumulate: 2, precision: float32, validate_every: 4}}
  - distill.latent: {train: *train}
  - distill.minitron: {train: *train, intermediate: on, correct_teacher: {lr: 1.0e-3}}
  - prune.squarehead: {teacher: stage:4, sparsity: 0.5, gradual: [0.3], start: magnitude,
      train: *train}
  - distill.ce: {train: {steps: 4, batch: 4, length: 16, lr: 0.5, warmup: 3, precision: float32,
      validate_every: 1}}  # faster and far too fast: an early look is the best
measures: []
"""
STAGES = (
    *("01-prune.minitron", "02-distill.kd", "03-distill.latent", "04-distill.minitron"),
    "05-prune.squarehead",
)
FAST = "06-distill.ce"


def torchrun(folder, out, *more):
    """`compress run` in two processes; (exit code, stderr)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "compressor.cli.main", "run", str(folder / "pair.yaml")]
    command += ["--model", str(folder / "pico-llama"), "--data", str(folder / "words.txt")]
    done = subprocess.run(
        [*command, "--out", str(out), *more],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return done.returncode, done.stderr


@pytest.fixture
def folder(llama_folder, text_file, tmp_path):
    """Model, text and profile."""
    (tmp_path / "pair.yaml").write_text(PROFILE)
    return tmp_path


def losses(home):
    records = map(json.loads, (home / "metrics.jsonl").read_text().splitlines())
    return {(r["stage"], r["step"]): r["loss"] for r in records if "loss" in r}


def test_two_processes_train_what_one_does(folder):
    one, two = folder / "one", folder / "two"
    arguments = {"model": str(folder / "pico-llama"), "data": str(folder / "words.txt")}
    compressor.run(folder / "pair.yaml", **arguments, out=one)
    code, said = torchrun(folder, two)
    assert code == 0, said
    log = (two / "log.txt").read_text()
    assert "2 processes share every batch" in log and log.count("starts") == len(STAGES) + 1
    wanted, got = ({k: v for k, v in losses(h).items() if k[0] != FAST} for h in (one, two))
    assert len(wanted) == 10 and got == pytest.approx(wanted, rel=1e-5)
    notes = [
        [read_manifest(home / stage).metrics["notes"]["validation"] for stage in STAGES[1:]]
        for home in (one, two)
    ]
    for mine, theirs in zip(*notes, strict=True):
        assert theirs.pop("parts") == pytest.approx(mine.pop("parts"), rel=1e-4)
        assert theirs == pytest.approx(mine, rel=1e-4) and mine["after"] < mine["before"]
    best = [
        read_manifest(home / FAST).metrics["notes"]["training"]["best_step"] for home in (one, two)
    ]
    assert best[0] == best[1] < 4
    assert compressor.verify(two / FAST)["ok"]
    for stage in STAGES:
        mine, theirs = (load_file(home / stage / "model.safetensors") for home in (one, two))
        for name in mine:
            assert (mine[name] - theirs[name]).abs().max() < 1e-4
        assert compressor.verify(two / stage)["ok"]
    # what two made, one finds made
    assert compressor.run(folder / "pair.yaml", **arguments, out=two).path == two


def test_a_refusal_is_said_once_and_ends_all(folder):
    busy = folder / "busy"
    busy.mkdir()
    (busy / "photo.jpg").write_text("x")
    code, said = torchrun(folder, busy)
    assert code != 0
    assert said.count("error: '") == 1 and "holds other files" in said


def test_a_batch_that_does_not_divide_is_refused():
    refuse_uneven(16, 4, "stages.2")
    with pytest.raises(CompressError, match="which 4 processes cannot share") as caught:
        refuse_uneven(10, 4, "stages.2")
    assert caught.value.hint == "--set stages.2.train.batch=8"
    with pytest.raises(CompressError) as caught:
        refuse_uneven(1, 3, "stages.2")
    assert caught.value.hint == "--set stages.2.train.batch=3"


def test_the_shares_of_a_batch_are_the_batch(make_work):
    batches = make_work(batch=6).batches("train", 2)
    shares = [Team(rank, 3).share(batches) for rank in range(3)]
    for i, batch in enumerate(batches):
        for key, whole in batch.items():
            assert [row for s in shares for row in s[i][key].tolist()] == whole.tolist()
