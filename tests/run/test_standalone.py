"""`compress export` and exports as stages: what is refused, what is left, and nothing is lost."""

import pytest

import compressor
from compressor.errors import CompressError
from compressor.run import standalone
from compressor.run.layout import locked


@pytest.mark.parametrize("to", ["compressed_tensors", "safetensors"])
def test_an_export_is_compared_on_the_data_of_its_run(to, llama_folder, text_file, tmp_path):
    profile = tmp_path / "p.yaml"
    rounding = "quantize.rtn: {bits: 8, embeddings: false, head: false, group: null}"
    profile.write_text(f"stages: [{{{rounding}}}, {{export.{to}: {{}}}}]\nmeasures: []\n")
    made = compressor.run(
        profile, model=str(llama_folder), data=str(text_file), out=tmp_path / "out"
    )
    found = compressor.Checkpoint.open(made.path / f"02-export.{to}")
    assert found.manifest.metrics["fidelity"]["kl"] < 0.1 and compressor.verify(found.path)["ok"]


def test_another_engine_may_be_asked_to_prove_an_artefact(llama_folder, tmp_path):
    out = tmp_path / "out"
    compressor.export_checkpoint(str(llama_folder), "onnx", out)
    assert compressor.verify(out)["ok"]
    assert compressor.verify(f"onnxruntime:{out}") == compressor.verify(out)
    with pytest.raises(CompressError, match="is for onnxruntime; gguf cannot run it"):
        compressor.verify(f"gguf:{out}")


def test_what_a_kill_left_is_emptied_and_two_exports_cannot_meet(llama_folder, tmp_path):
    scratch = tmp_path / ".compress-made"
    (scratch / "made.partial").mkdir(parents=True)
    (scratch / ".lock").touch()
    with locked(scratch), pytest.raises(CompressError, match="another run is working"):
        compressor.export_checkpoint(str(llama_folder), "safetensors", tmp_path / "made")
    compressor.export_checkpoint(str(llama_folder), "safetensors", tmp_path / "made")
    assert not scratch.exists() and compressor.verify(tmp_path / "made")["ok"]


def test_a_target_that_appears_meanwhile_loses_no_work(llama_folder, tmp_path, monkeypatch):
    target, export = tmp_path / "made", standalone.export_into

    def meanwhile(*arguments, **more):
        (target / "mine").mkdir(parents=True)
        return export(*arguments, **more)

    monkeypatch.setattr(standalone, "export_into", meanwhile)
    with pytest.raises(CompressError, match="appeared while it was being made"):
        compressor.export_checkpoint(str(llama_folder), "safetensors", target)
    assert not list(tmp_path.glob(".compress-*"))
    assert compressor.verify(tmp_path / "made.2")["ok"] and (target / "mine").is_dir()


def test_a_target_below_a_file_is_refused(llama_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CompressError, match="cannot write to"):
        compressor.export_checkpoint(str(llama_folder), "safetensors", tmp_path / "file" / "x")


def test_a_run_names_its_last_checkpoint_for_export(llama_folder, tmp_path):
    profile = tmp_path / "p.yaml"
    profile.write_text("stages: [{quantize.rtn: {bits: 8, group: null}}, {export.safetensors: {}}]")
    made = compressor.run(profile, model=str(llama_folder), out=tmp_path / "out")
    with pytest.raises(CompressError, match="directory of a whole run") as caught:
        compressor.export_checkpoint(str(made.path), "onnx", tmp_path / "made")
    assert "01-quantize.rtn --to TARGET --out DIR" in caught.value.hint


def test_a_target_that_cannot_hold_the_weights_names_those_that_can(llama_folder, tmp_path):
    profile = tmp_path / "p.yaml"
    profile.write_text("stages: [{quantize.rtn: {bits: 4, group: 16, uneven: channel}}]")
    made = compressor.run(profile, model=str(llama_folder), out=tmp_path / "out")
    with pytest.raises(CompressError) as caught:
        compressor.export_checkpoint(
            str(made.checkpoint.path), "compressed_tensors", tmp_path / "made"
        )
    assert caught.value.hint.endswith(
        "export.onnx or export.huffman would hold these weights as they are"
    )
