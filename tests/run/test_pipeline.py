"""A whole run on a pico model: what it leaves, what a second run does, what it refuses."""

import fcntl
import json
import shutil

import pytest
import torch

import compressor
from compressor.errors import CompressError
from compressor.model.manifest import read_manifest
from compressor.run.agreement import Comparison
from compressor.run.layout import locked

STAGES = ["01-prune.minitron", "02-distill.kd", "03-quantize.rtn", "04-export.safetensors"]
SERVED = [*STAGES[:3], "04-export.onnx"]


@pytest.fixture
def arguments(llama_folder, text_file, tmp_path):
    """Of `compressor.run`, but for the profile."""
    return {"model": str(llama_folder), "data": str(text_file), "out": tmp_path / "out"}


@pytest.fixture
def made_once(arguments, tmp_path_factory):
    """Factory: run a profile the first time, copy what it left for every other test."""

    def make(profile):
        kept = tmp_path_factory.getbasetemp() / f"finished-{profile.stem}"
        if kept.is_dir():
            shutil.copytree(kept, arguments["out"])
        result = compressor.run(profile, **arguments)  # a copy has nothing left to do
        if not kept.is_dir():
            shutil.copytree(arguments["out"], kept)
        return result, profile, arguments

    return make


@pytest.fixture
def finished(made_once, chain):
    """A finished run and the arguments that made it."""
    return made_once(chain)


@pytest.fixture
def served(made_once, chain, tmp_path):
    """The same with an export for ONNX Runtime, which takes longer than all stages before it."""
    path = tmp_path / "served.yaml"
    path.write_text(chain.read_text().replace("export.safetensors", "export.onnx"))
    return made_once(path)


def test_a_finished_stage_that_was_cut_short_is_refused(finished):
    result, profile, arguments = finished
    file = result.path / STAGES[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(
        CompressError, match=r"model.safetensors' of a finished stage is not as it was"
    ) as caught:
        compressor.run(profile, **arguments)
    assert "--redo 2" in caught.value.hint


def stamps(home, stages=STAGES):
    return {name: (home / name / "manifest.json").stat().st_mtime_ns for name in stages}


def test_a_run_leaves_proven_directories_and_a_second_run_skips_them(served):
    result, chain, arguments = served
    home = result.path
    for name in SERVED:
        manifest = read_manifest(home / name)
        assert str(home) not in (home / name / "manifest.json").read_text()
        assert manifest.stages[-1].method == name.partition("-")[2]
        report = compressor.verify(home / name)
        assert report["ok"], report
    assert (home / "report.md").is_file() and (home / "profile.yaml").is_file()
    sizes = compressor.inspect(str(home / STAGES[1]))["sizes"]
    assert sizes["mlp"] == 32 and sizes["layers"] == 2
    before = stamps(home, SERVED)
    compressor.run(chain, **arguments)
    assert stamps(home, SERVED) == before


def test_two_runs_of_the_same_profile_give_the_same_bits(finished, tmp_path):
    result, chain, arguments = finished
    other = compressor.run(chain, **arguments | {"out": tmp_path / "again"})
    for name in STAGES[:3]:
        for file in ("model.safetensors", "packed.safetensors"):
            mine, its = (read_manifest(r.path / name).files.get(file) for r in (result, other))
            assert mine == its


def test_the_artifact_generates_what_the_checkpoint_generates(served):
    result, _, _ = served
    texts = []
    for path in (result.checkpoint.path, result.artifacts[0].path):
        engine = compressor.open_engine(path)
        texts.append(compressor.generate(engine, [2, 10, 11, 12], 12))
        engine.close()
    assert texts[0] == texts[1]


def test_a_changed_stage_is_refused_until_redo(finished):
    result, chain, arguments = finished
    before = stamps(result.path)
    with pytest.raises(CompressError) as caught:
        compressor.run(chain, **arguments, set=["stages.3.bits=4"])
    assert "bits was 8, now 4" in caught.value.what and "--redo 3" in caught.value.hint
    compressor.run(chain, **arguments, set=["stages.3.bits=4"], redo=3)
    after = stamps(result.path)
    assert [before[n] == after[n] for n in STAGES] == [True, True, False, False]
    assert compressor.verify(result.path / STAGES[3])["ok"]


def test_another_model_is_refused(finished, pico_llama, tmp_path):
    _, chain, arguments = finished
    other = tmp_path / "other"
    model = pico_llama(seed=1)
    model.module.save_pretrained(other)
    model.processor.save_pretrained(other)
    with pytest.raises(CompressError, match="another model"):
        compressor.run(chain, **arguments | {"model": str(other)})


@pytest.mark.parametrize("file", ["model.onnx", "config.json", "probe.safetensors"])
def test_verify_names_a_file_that_changed(served, file):
    result, _, _ = served
    path = result.path / SERVED[3] / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    report = compressor.verify(path.parent)
    assert not report["ok"]
    assert file in [check["name"] for check in report["checks"] if not check["ok"]]


def test_an_interrupted_run_continues(chain, arguments, tmp_path, monkeypatch):
    from compressor.run import kinds

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kinds, "export_into", stop)
        with pytest.raises(KeyboardInterrupt):
            compressor.run(chain, **arguments)
    assert [(tmp_path / "out" / name).is_dir() for name in STAGES] == [True, True, True, False]
    result = compressor.run(chain, **arguments)
    assert compressor.verify(result.artifacts[0].path)["ok"]


def test_a_disagreeing_engine_is_refused_and_keeps_a_rejected_name(served, monkeypatch):
    from compressor.run import gate

    result, profile, arguments = served
    out = result.path
    monkeypatch.setattr(gate, "compare", lambda *_: Comparison({"logits": 0.5}))
    with pytest.raises(CompressError) as caught:
        compressor.run(profile, **arguments, redo=4)
    assert caught.value.exit_code == 3
    assert (out / "04-export.onnx.rejected" / "model.onnx").is_file()
    with pytest.raises(CompressError, match=r"was refused: .*disagrees with torch"):
        compressor.verify(out / "04-export.onnx.rejected")
    assert not (out / "04-export.onnx").exists()


def test_a_refused_baseline_keeps_its_name_in_its_own_folder(
    chain, llama_folder, text_file, tmp_path, monkeypatch
):
    from compressor.run import gate

    out = tmp_path / "out"
    chain.write_text(
        "stages: [{quantize.rtn: {group: 16}}]\nmeasures: []\n"
        "baselines: {plain: [export.safetensors]}\n"
    )
    monkeypatch.setattr(gate, "compare", lambda *_: Comparison({"logits": 0.5}))
    with pytest.raises(CompressError, match="disagrees"):
        compressor.run(chain, model=str(llama_folder), data=str(text_file), out=out)
    assert (
        out / "baselines" / "plain" / "01-export.safetensors.rejected" / "model.safetensors"
    ).is_file()
    assert not list(out.glob("*.rejected"))


@pytest.mark.parametrize(("measures", "said"), [("", 0), ("size", 0), ("size, perplexity", 1)])
def test_a_report_says_where_quality_comes_from_only_where_it_was_measured(
    measures, said, llama_folder, text_file, tmp_path
):
    profile = tmp_path / "p.yaml"
    profile.write_text(f"stages: [{{quantize.rtn: {{group: 16}}}}]\nmeasures: [{measures}]\n")
    given = {"model": str(llama_folder), "data": str(text_file)}
    home = compressor.run(profile, out=tmp_path / "out", **given).path
    for name in ("report.md", "report.html"):
        assert (home / name).read_text().count("Quality is measured on") == said


def test_a_second_run_on_a_busy_directory_is_refused(chain, llama_folder, text_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(CompressError, match="another run is working"):
            compressor.run(chain, model=str(llama_folder), data=str(text_file), out=out)


def test_a_foreign_directory_is_left_alone(chain, llama_folder, text_file, tmp_path):
    out = tmp_path / "holiday"
    out.mkdir()
    (out / "photo.jpg").write_text("x")
    with pytest.raises(CompressError, match="holds other files"):
        compressor.run(chain, model=str(llama_folder), data=str(text_file), out=out)
    assert [f.name for f in out.iterdir()] == ["photo.jpg"]


def test_a_full_disk_is_one_sentence_and_keeps_what_is_done(
    chain, arguments, tmp_path, monkeypatch
):
    from compressor.run import kinds

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(kinds, "export_into", full)
        with pytest.raises(CompressError, match="No space left"):
            compressor.run(chain, **arguments)
    assert (tmp_path / "out" / STAGES[2]).is_dir()
    assert compressor.run(chain, **arguments).artifacts


def test_too_little_memory_is_refused_with_the_numbers(
    chain, llama_folder, text_file, tmp_path, monkeypatch
):
    from compressor.run import preflight

    monkeypatch.setattr(preflight, "memory_available", lambda: 10**6)
    with pytest.raises(CompressError, match="of memory"):
        compressor.run(chain, model=str(llama_folder), data=str(text_file), out=tmp_path / "out")


def test_the_user_s_folder_is_never_written(finished, llama_folder):
    names = {file.name for file in llama_folder.iterdir()}
    assert "manifest.json" not in names and "probe.safetensors" not in names


def test_plan_predicts_the_parameters_that_come_out(finished, tmp_path):
    result, chain, arguments = finished
    plan = compressor.plan(chain, model=arguments["model"], data=arguments["data"])
    assert plan["fits"]
    for stage in plan["stages"][:3]:
        made = compressor.inspect(str(result.path / stage["name"]))
        assert made["parameters"] == stage["parameters_out"]
        assert made["bytes"] < 3 * stage["bytes_out"] + 100_000
    weights = result.path / STAGES[2] / "model.safetensors"
    assert weights.stat().st_size == plan["stages"][2]["bytes_out"]


def test_standalone_export(finished, tmp_path):
    result, _, _ = finished
    made = compressor.export_checkpoint(str(result.checkpoint.path), "safetensors", tmp_path / "x")
    assert compressor.verify(made.path)["ok"]
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(CompressError, match="did you mean onnx"):
        compressor.export_checkpoint(str(result.checkpoint.path), "onx", tmp_path / "x")
    with pytest.raises(CompressError, match="an artefact already"):
        compressor.export_checkpoint(str(result.artifacts[0].path), "onnx", tmp_path / "x")


def test_keep_last_deletes_only_the_weights_between(chain, arguments):
    home = compressor.run(chain, **arguments, set=["keep=last"]).path
    weights = ("model.safetensors", "packed.safetensors")
    kept = [any((home / name / file).is_file() for file in weights) for name in STAGES[:3]]
    assert kept == [False, False, True]
    assert all(compressor.verify(home / name)["ok"] for name in STAGES)
    before = stamps(home)
    assert compressor.run(chain, **arguments, set=["keep=last"]).artifacts
    with pytest.raises(CompressError, match="kept no weights") as caught:
        compressor.run(chain, **arguments, redo=3)
    assert caught.value.hint == "--redo 1"
    assert stamps(home) == before


def test_what_a_killed_run_did_not_come_to_is_done_later(chain, arguments, monkeypatch):
    """Killed when a trained stage has its name, and when `keep: last` deletes the weights."""
    from compressor.run import forget, steps

    home = arguments["out"]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps, "_clear", lambda scratch: "distill" in scratch.name and stop())
        with pytest.raises(KeyboardInterrupt):
            compressor.run(chain, **arguments, set=["keep=last"])
    assert (home / STAGES[1]).is_dir() and list((home / ".scratch").glob("02-distill-kd.*"))
    write = forget.write_manifest

    def write_and_stop(directory, manifest):
        write(directory, manifest)
        if directory.name == STAGES[0]:
            stop()

    with monkeypatch.context() as patch:
        patch.setattr(forget, "write_manifest", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            compressor.run(chain, **arguments, set=["keep=last"])
    assert (home / STAGES[0] / "model.safetensors").is_file()
    compressor.run(chain, **arguments, set=["keep=last"])
    assert not (home / STAGES[0] / "model.safetensors").exists()
    assert not (home / ".scratch").exists()
    lines = (home / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in lines} == {STAGES[1]}


def test_redo_deletes_nothing_when_an_earlier_stage_changed(finished):
    result, chain, arguments = finished
    before = stamps(result.path)
    with pytest.raises(CompressError, match="mlp was 32, now 16"):
        compressor.run(chain, **arguments, set=["stages.1.sizes.mlp=16"], redo=3)
    assert stamps(result.path) == before
    assert "mlp: 32" in (result.path / "profile.yaml").read_text()


def test_another_dtype_is_another_stage(finished):
    _, chain, arguments = finished
    with pytest.raises(CompressError, match="another dtype"):
        compressor.run(chain, **arguments, set=["dtype=bfloat16"])


def test_a_floor_also_holds_for_a_finished_export(served):
    result, chain, arguments = served
    with pytest.raises(CompressError, match=r"below the floor of 1\.0") as caught:
        compressor.run(chain, **arguments, set=["floor.top1_agreement=1.0"])
    assert caught.value.exit_code == 3
    assert (result.path / "04-export.onnx.rejected").is_dir()


def test_a_baseline_of_other_settings_is_made_again(chain, arguments):
    chain.write_text(chain.read_text() + "baselines: {plain: [export.safetensors]}\n")
    home = compressor.run(chain, **arguments).path
    baseline = home / "baselines" / "plain" / "01-export.safetensors" / "manifest.json"
    before = baseline.stat().st_mtime_ns
    compressor.run(chain, **arguments, redo=3)
    assert baseline.stat().st_mtime_ns == before
    compressor.run(
        chain, **arguments, set=["baselines.plain=[{export.safetensors: {dtype: float16}}]"]
    )
    assert baseline.stat().st_mtime_ns != before


def test_an_interrupted_stage_is_not_continued_with_another_teacher(
    chain, llama_folder, pico_llama, text_file, tmp_path, monkeypatch
):
    from compressor.run import kinds

    other = tmp_path / "teacher"
    pico_llama(seed=5).module.save_pretrained(other)
    arguments = {"model": str(llama_folder), "data": str(text_file)}
    short = ["stages.2.train.snapshot_seconds=0"]

    save = kinds.save_and_prove

    def stop_after_training(model, *rest, **named):
        if "loss" in model.notes:
            raise KeyboardInterrupt
        return save(model, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(kinds, "save_and_prove", stop_after_training)
        with pytest.raises(KeyboardInterrupt):
            compressor.run(chain, **arguments, out=tmp_path / "a", set=short)
    assert list((tmp_path / "a" / ".scratch").glob("02-*/snapshot*"))
    clean = compressor.run(chain, **arguments, out=tmp_path / "b", set=short, teacher=str(other))
    mixed = compressor.run(chain, **arguments, out=tmp_path / "a", set=short, teacher=str(other))
    files = [read_manifest(r.path / STAGES[1]).files["model.safetensors"] for r in (clean, mixed)]
    assert files[0] == files[1]


def test_a_profile_without_data_quantizes_and_exports(llama_folder, tmp_path):
    profile = tmp_path / "p.yaml"
    profile.write_text("stages: [{quantize.rtn: {group: 16}}, export.safetensors]\n")
    result = compressor.run(profile, model=str(llama_folder), out=tmp_path / "out")
    assert result.metrics["bench"] is None
    assert compressor.verify(result.artifacts[0].path)["ok"]
    with pytest.raises(CompressError, match="names no data"):
        compressor.run(
            profile, model=str(llama_folder), out=tmp_path / "out", set=["floor.cosine=0.5"]
        )


def test_a_refused_first_run_does_not_claim_the_directory(chain, llama_folder, text_file, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CompressError):
        compressor.run(chain, model=str(llama_folder), data="nofile.txt", out=out)
    assert not (out / "00-source").exists()


def test_our_own_quantized_checkpoint_can_be_the_source(finished, tmp_path):
    result, _, _ = finished
    profile = tmp_path / "p.yaml"
    profile.write_text("stages: [export.safetensors]\n")
    made = compressor.run(profile, model=str(result.path / STAGES[2]), out=tmp_path / "dense")
    base = read_manifest(made.path / "01-export.safetensors").base_model
    assert base == read_manifest(result.path / STAGES[2]).base_model


def test_nan_weights_stop_the_run(chain, llama_folder, text_file, tmp_path, pico_llama):
    model = pico_llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.module.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.module.save_pretrained(llama_folder)
    with pytest.raises(CompressError):
        compressor.run(chain, model=str(llama_folder), data=str(text_file), out=tmp_path / "out")
    left = [d.name for d in (tmp_path / "out").glob("0[1-9]-*")]
    assert "02-distill.kd" not in left


def test_report_json_is_valid_and_holds_no_absolute_path(finished, tmp_path):
    result, _, _ = finished
    text = (result.path / "report.json").read_text()
    assert json.loads(text)["stages"][0]["name"] == STAGES[0]
    for name in ("report.json", "report.md", "report.html"):
        assert str(tmp_path) not in (result.path / name).read_text()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("stages.3.group=7", "group 7 does not divide"),
        ("stages.3.group=8", "ONNX Runtime has no groups of 8"),
        ("stages.3.bits=3", "ONNX Runtime serves weights of 8, 4 and 2 bits; .* has 3"),
        ("stages.1.sizes.heads=3", "do not fit llama"),
        ("stages.2.teacher=stage:3", "is no earlier stage"),
    ],
)
def test_what_would_fail_late_fails_before_any_work(
    chain, llama_folder, text_file, tmp_path, change, what
):
    out = tmp_path / "out"
    chain.write_text(chain.read_text().replace("export.safetensors", "export.onnx"))
    arguments = {"model": str(llama_folder), "data": str(text_file), "set": [change]}
    for attempt in (compressor.plan, compressor.run):
        with pytest.raises(CompressError, match=what):
            attempt(chain, out=out, **arguments)
    assert not list(out.glob("0[1-9]-*"))


def test_a_method_for_another_task_fails_before_any_work(chain, pico_bert, text_file, tmp_path):
    model = pico_bert()
    model.module.save_pretrained(tmp_path / "bert")
    model.processor.save_pretrained(tmp_path / "bert")
    out = tmp_path / "out"
    with pytest.raises(CompressError, match="needs a model that predicts"):
        compressor.run(chain, model=str(tmp_path / "bert"), data=str(text_file), out=out)
    assert not list(out.glob("0[1-9]-*"))


def test_a_refused_command_keeps_the_note_of_a_killed_run(tmp_path):
    (tmp_path / ".lock").write_text("1 02-distill.kd\n")  # what a kill leaves
    with pytest.raises(CompressError), locked(tmp_path) as lock:
        assert lock.killed_in == "02-distill.kd"
        raise CompressError("another model", "")
    with locked(tmp_path) as lock:
        assert lock.killed_in == "02-distill.kd"
        lock.note("03-quantize.rtn")
    with locked(tmp_path) as lock:
        assert lock.killed_in == ""


def test_a_whole_run_is_named_as_such(finished):
    home = finished[0].path
    for call in (compressor.inspect, compressor.verify):
        with pytest.raises(CompressError, match="directory of a whole run; it holds 01-prune"):
            call(str(home))
    with pytest.raises(CompressError, match="only says what a run started from"):
        compressor.verify(home / "00-source")
    with pytest.raises(CompressError, match="no finished stage"):
        compressor.inspect(str(home / "07-absent"))
