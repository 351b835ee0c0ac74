"""The command line against a core that is replaced by recorders: flags, output, exit codes."""

import errno
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import compressor
from compressor.errors import CompressError, Refused

main = importlib.import_module("compressor.cli.main")
COMMANDS = ("run", "plan", "bench", "compare", "inspect", "methods", "profiles", "export", "verify")


@pytest.fixture
def core(monkeypatch):
    """`core(name, result or exception)` replaces one function of the core; returns its calls."""

    def replace(name, result):
        calls = []

        def fake(*positional, **named):
            calls.append((positional, named))
            if isinstance(result, BaseException):
                raise result
            return result

        # the dictionary, not the attribute: reading the attribute would import the real core
        monkeypatch.setitem(vars(compressor), name, fake)
        return calls

    return replace


def test_help_imports_nothing_heavy_and_is_quick():
    script = (
        "import sys; sys.argv = ['compress', *sys.argv[1:]]\n"
        "from compressor.cli.main import call\n"
        "code = call(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'yaml'}\n"
        "sys.exit(code or ', '.join(heavy & set(sys.modules)) or 0)"
    )
    for arguments in (["--help"], ["run", "--help"]):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert time.perf_counter() - start < 3  # 0.1 s on a free machine
        assert "--out" in done.stdout or all(name in done.stdout for name in COMMANDS)


def test_completion_offers_shipped_profiles_and_methods():
    flags = importlib.import_module("compressor.cli.flags")
    assert "demo" in flags._profiles("de")
    assert "prune.minitron" in flags._methods("prune.")


def test_run_passes_every_flag(core, sample_report, capsys):
    calls = core("run", SimpleNamespace(path=Path("out/x"), metrics=sample_report))
    line = "run demo --model m --teacher t --data d.txt --out out/x --set seed=1 --set keep=last"
    assert main.call([*line.split(), "--redo", "2", "--quiet"]) == 0
    (positional, named) = calls[0]
    named.pop("screen")
    assert positional == ("demo",)
    assert named == {
        "model": "m",
        "teacher": "t",
        "data": "d.txt",
        "out": Path("out/x"),
        "set": ("seed=1", "keep=last"),
        "redo": 2,
    }
    assert capsys.readouterr().err == ""


def test_run_ends_with_table_verdict_paths_and_usage(core, sample_report, capsys):
    core("run", SimpleNamespace(path=Path("out/x"), metrics=sample_report))
    assert main.call(["run", "demo", "--out", "out/x"]) == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 100
    assert "\x1b" not in shown
    assert "22.71M" in shown and "0.953 [0.943, 0.953]" in shown
    assert "ours (onnx) is 5.0x smaller, 3.9x faster" in shown
    assert "same domain as the training text" in shown
    assert "out/x/report.html" in shown
    assert "DIR = 'out/x/03-export.onnx'\none\ntwo\nprint(DIR)\n" in shown


def test_run_withholds_the_verdict_on_speed_when_noisy(core, sample_report, capsys):
    sample_report["bench"]["noisy"] = True
    core("run", SimpleNamespace(path=Path("out/x"), metrics=sample_report))
    assert main.call(["run", "demo", "--out", "out/x"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no verdict on speed" in shown and "faster" not in shown


def test_run_without_measures_shows_the_stages(core, sample_report, capsys):
    sample_report["bench"] = None
    core("run", SimpleNamespace(path=Path("out/x"), metrics=sample_report))
    assert main.call(["run", "demo", "--out", "out/x"]) == 0
    assert "01-prune.minitron" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code"), [(CompressError, 2), (Refused, 3)])
def test_a_users_mistake_is_two_lines(core, capsys, error, code):
    core("run", error("the thing\nis wrong", "type this"))
    assert main.call(["run", "demo", "--out", "x"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: the thing is wrong\nhint: type this\n"


def test_interrupt_prints_the_command_that_resumes(core, capsys):
    core("run", KeyboardInterrupt())
    line = [
        "run",
        "my profile.yaml",
        "--redo",
        "2",
        "--out",
        "x",
        "--set",
        "stages.1.train.steps=3",
    ]
    assert main.call(line) == 130
    expected = "compress run 'my profile.yaml' --out x --set stages.1.train.steps=3"
    assert capsys.readouterr().err.endswith(f"hint: {expected}\n")


def test_an_interrupt_before_the_stage_is_deleted_keeps_redo(core, capsys, tmp_path):
    core("run", KeyboardInterrupt())
    old = tmp_path / "02-distill.kd"
    old.mkdir()
    os.utime(old, (0, 0))  # of a run before this one
    assert main.call(["run", "p.yaml", "--redo", "2", "--out", str(tmp_path)]) == 130
    assert f"--redo 2 --out {tmp_path}" in capsys.readouterr().err
    os.utime(old)  # made anew since
    assert main.call(["run", "p.yaml", "--redo", "2", "--out", str(tmp_path)]) == 130
    assert "--redo" not in capsys.readouterr().err


def test_a_crash_is_one_line_and_the_traceback_is_in_the_log(core, capsys, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    core("run", ZeroDivisionError("ours"))
    assert main.call(["run", "demo", f"--out={tmp_path}"]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: compress crashed (ZeroDivisionError: ours)"
    assert str(log) in hint
    assert log.read_text().startswith("before\nTraceback")


@pytest.mark.parametrize("line", [["run", "demo", "--out", "new"], ["inspect", "x"]])
def test_a_crash_without_an_output_directory_logs_elsewhere(
    core, capsys, tmp_path, monkeypatch, line
):
    core(line[0], ZeroDivisionError("ours"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.txt").write_text("not ours")
    assert main.call(line) == 1
    assert [p.read_text() for p in tmp_path.iterdir()] == ["not ours"]
    log = Path(capsys.readouterr().err.split()[-1])
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    ],
)
def test_an_exhausted_machine_is_the_users_to_solve(core, capsys, error, said):
    core("run", error)
    assert main.call(["run", "demo", "--out", "x"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}\nhint: ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run demo --modle x --out y", "no such option: --modle; did you mean --model?"),
        ("rnu demo", "Did you mean 'run'"),
        ("run", "missing argument 'PROFILE'"),
        ("run demo", "missing option '--out'"),
        ("run demo --out x --redo two", "invalid value for '--redo'"),
        ("verify a b", "unexpected extra argument"),
        ("inspect", "name one PATH, or --kernels"),
    ],
)
def test_usage_errors_have_the_same_form(capsys, line, said):
    assert main.call(line.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    error, hint = shown.err.splitlines()
    assert error.startswith("error: ") and said in error
    assert hint.startswith("hint: compress")


PLAN = {
    "fits": True,
    "stages": [
        {"name": "01-prune.minitron", "parameters_out": 5, "bytes_out": 20}
        | {"peak_memory_bytes": 10, "disk_bytes": 20, "done": False, "seconds": 3.0}
    ],
    "remarks": ["half of them are zeros"],
    "machine": {"memory_available_bytes": 100, "disk_free_bytes": 100},
}
METHOD = {"name": "a.b", "paper": None, "summary": "[bold]", "options": {"k": {"type": "int"}}}
METHOD["options"]["k"]["default"] = 1
INSPECTED = {
    "path": "x",
    "kind": "checkpoint",
    "engine": None,
    "family": "bert",
    "parameters": 1,
    "nonzero_parameters": None,
    "bytes": 4,
    "dtype": "float32",
    "sizes": {"hidden": 8},
    "formats": {"a": {"bits": 4, "group": 32, "scale_dtype": "float16"}},
    "stages": [{"method": "quantize.rtn", "seconds": 2.0}],
    "metrics": {},
    "complete": True,
}
VERIFIED = {"ok": True, "checks": [{"name": "probe", "ok": True, "detail": "fine"}]}
RESULTS = [
    ("plan demo", "plan", PLAN, "01-prune.minitron"),
    ("plan demo", "plan", PLAN, "note: half of them are zeros"),
    ("inspect x", "inspect", INSPECTED, "1 modules: bits 4, group 32"),
    ("inspect --kernels", "list_kernels", [{"op": "o", "implementation": "i", "reason": "r"}], "o"),
    ("methods", "list_methods", [METHOD], "[bold]"),
    ("methods a.b", "list_methods", [METHOD], "k"),
    (
        "profiles",
        "list_profiles",
        [{"name": "p", "description": "d", "stages": ["s"]}],
        "p",
    ),
    ("verify x", "verify", VERIFIED, "fine"),
]


@pytest.mark.parametrize(("line", "name", "result", "said"), RESULTS)
def test_results_as_table_and_as_one_json_document(core, capsys, line, name, result, said):
    core(name, result)
    assert main.call(line.split()) == 0
    assert said in capsys.readouterr().out
    assert main.call([*line.split(), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == result
    assert shown.err == ""


def test_bench_passes_every_flag_and_withholds_the_verdict_when_noisy(core, sample_report, capsys):
    bench = sample_report["bench"] | {"noisy": True, "domain": "On text."}
    for candidate, name in zip(bench["candidates"], ("a", "b", "c"), strict=True):
        candidate["name"] = name
    calls = core("bench", bench)
    line = "bench a b --data f.txt --measure size --measure kl --threads 2 --rounds 3 --out o"
    line += " --set kl.rows=4"
    assert main.call(line.split()) == 0
    (positional, named) = calls[0]
    named.pop("screen")
    assert positional == (["a", "b"],)
    assert named == {
        "data": "f.txt",
        "measures": ("size", "kl"),
        "threads": 2,
        "rounds": 3,
        "device": "cpu",
        "out": Path("o"),
        "set": ("kl.rows=4",),
    }
    shown = " ".join(capsys.readouterr().out.split())
    assert "the machine was BUSY" in shown and "no verdict on speed" in shown
    assert "faster" not in shown and "Against a, b is" in shown and "o/report.html" in shown
    assert main.call(["bench", "a", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == bench and shown.err == ""


COMPARED = {
    "quality": "perplexity",
    "candidates": [
        {"name": "a", "engine": "onnxruntime", "parameters": 1e6, "bytes": 4e6, "front": ["bytes"]}
        | {"latency_ms": None, "quality": {"value": 30.0, "low": None, "high": None}}
    ],
    "picked": "a",
    "pick": "Pick a.",
    "truths": ["a is not faster."],
    "notes": ["Speed is not compared."],
}


def test_compare_shows_the_front_the_pick_and_the_truth(core, capsys):
    calls = core("compare", COMPARED)
    assert main.call(["compare", "x", "y", "--out", "o"]) == 0
    assert calls == [((["x", "y"],), {"out": Path("o")})]
    shown = capsys.readouterr().out
    for part in ("a  ←", "30.00", "size", "Pick a.", "not faster", "not compared", "o/report.html"):
        assert part in shown
    assert main.call(["compare", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == COMPARED


def test_failed_verification_exits_3_after_its_json(core, capsys):
    failed = {"ok": False, "checks": [{"name": "model.onnx", "ok": False, "detail": "changed"}]}
    core("verify", failed)
    assert main.call(["verify", "x", "--json"]) == 3
    shown = capsys.readouterr()
    assert json.loads(shown.out) == failed
    assert shown.err.startswith("error: x failed 1 of 1 checks: model.onnx\nhint: ")


def test_a_plan_that_does_not_fit_exits_2_with_the_numbers(core, capsys):
    machine = {"memory_available_bytes": 1, "disk_free_bytes": 100}
    core("plan", PLAN | {"fits": False, "machine": machine})
    assert main.call(["plan", "demo"]) == 2
    shown = capsys.readouterr()
    assert "does NOT fit" in shown.out
    assert shown.err.startswith("error: 01-prune.minitron needs about")


def test_export_prints_where_it_wrote(core, capsys):
    manifest = SimpleNamespace(engine="gguf", metrics={})
    calls = core("export_checkpoint", SimpleNamespace(path=Path("made"), manifest=manifest))
    assert main.call(["export", "ckpt", "--to", "onnx", "--out", "made", "--set", "opset=20"]) == 0
    assert calls[0][1] == {"to": "onnx", "out": Path("made"), "set": ("opset=20",)}
    shown = capsys.readouterr()
    assert shown.out == "made\n" and "llama.cpp has not run it" in shown.err
