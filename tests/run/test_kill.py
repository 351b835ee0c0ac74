"""Three killed runs end with the bits of one that nobody interrupted (benchmarks/resume.py)."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest

import compressor
from compressor.errors import CompressError
from compressor.screen import Silent

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "resume.py"


@pytest.fixture
def resume(monkeypatch):
    """The benchmark as a module, which finds the scripts beside it."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(SCRIPT.parent)])
    found = importlib.util.spec_from_file_location("resume", SCRIPT)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def in_this_process(folder, profile, out):
    """The command that continues, without the seconds that a new process takes to import."""
    arguments = {"model": str(folder / "pico"), "data": str(folder / "words.txt"), "out": out}
    compressor.run(folder / f"{profile}.yaml", **arguments)


def test_kill_9_and_the_same_command_give_the_same_bits(resume, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "finish", in_this_process)
    short = resume.PROFILE.replace("steps: 40", "steps: 16").replace("[size, fidelity]", "[size]")
    monkeypatch.setattr(resume, "PROFILE", short)  # nothing is killed while it measures
    resume.build(tmp_path)
    references = resume.reference_runs(tmp_path, ["short"])
    for number, target in enumerate(["training kd", "saving prune", "exporting"]):
        cell = resume.trial(tmp_path, number, references, "short", target)
        assert cell["identical"] and cell["killed"], cell


class Said(Silent):
    """A screen that collects its lines."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_a_second_process_is_refused_and_a_killed_one_leaves_word(resume, tmp_path):
    resume.build(tmp_path)
    out, screen = tmp_path / "out", Said()
    run = partial(
        compressor.run,
        tmp_path / "short.yaml",
        model=str(tmp_path / "pico"),
        data=str(tmp_path / "words.txt"),
        out=out,
        screen=screen,
    )
    first = resume.start(tmp_path, "short", out)
    resume.wait(first, lambda: next(out.glob(".scratch/03-*/snapshot-*"), None), 60)
    with pytest.raises(CompressError, match="another run is working") as caught:
        run()
    assert first.poll() is None, "the first run ended too early"
    assert f"(process {first.pid})" in caught.value.what and caught.value.exit_code == 2
    first.kill()
    first.communicate()
    assert run().artifacts
    assert screen.lines[0].startswith("the previous run ended in 03-distill.kd (killed")
    assert any(line.startswith("  continuing after step") for line in screen.lines)
    assert (out / ".lock").read_text() == ""
