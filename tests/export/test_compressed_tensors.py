"""export.compressed_tensors: an artefact that plain transformers serves, or a refusal."""

import pytest
from safetensors.torch import load_file, save_file

import compressor
from compressor.errors import CompressError
from compressor.export import compressed_tensors as export
from compressor.model.manifest import list_files, write_manifest
from compressor.quantize import nf4, rtn
from compressor.run.gate import open_and_check
from compressor.run.prove import save_and_prove

FLOAT_TABLES = {"embeddings": False, "head": False}


@pytest.mark.parametrize(
    ("settings", "tight"),
    [
        ({"bits": 4, "group": 16, **FLOAT_TABLES}, True),
        ({"bits": 8, "group": 16}, True),
        ({"bits": 8, "group": None, "activation": "token"}, False),
    ],
)
def test_agreement_is_that_of_plain_transformers(pico_llama, make_work, tmp_path, settings, tight):
    model = pico_llama(tie_word_embeddings=True)
    rtn.run(model, rtn.Options(**settings), make_work())
    artifact = export.run(model, export.Options(), tmp_path)
    assert (artifact.engine, artifact.manifest.formats) == ("transformers", model.formats)
    found = open_and_check("transformers", tmp_path, model.formats.values())
    assert found.ok and (found.tolerance < 1e-3) == tight
    assert not tight or max(found.errors.values()) < 1e-5


def test_a_changed_weight_is_noticed(pico_bert, make_work, tmp_path):
    model = pico_bert()
    rtn.run(model, rtn.Options(bits=8, group=16), make_work())
    export.run(model, export.Options(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.layer.1.output.dense.weight_scale"] *= 2
    save_file(tensors, file, {"format": "pt"})
    found = open_and_check("transformers", tmp_path, model.formats.values())
    assert not found.ok and "last_hidden_state" in found.failure


def test_exported_from_a_checkpoint(pico_llama, make_work, tmp_path):
    """As `compress export --to compressed_tensors`: card, verify, inspect."""
    model, parent, source = pico_llama(), tmp_path / "parent", tmp_path / "source"
    parent.mkdir()
    rtn.run(model, rtn.Options(bits=4, group=16, **FLOAT_TABLES), make_work())
    model.processor.save_pretrained(source)
    manifest = save_and_prove(model, parent, source)
    manifest.base_model.update(id="pico", sha256="0" * 64, license=None)
    manifest.files.update(list_files(parent))
    write_manifest(parent, manifest)
    out = tmp_path / "out"
    made = compressor.export_checkpoint(str(parent), "compressed_tensors", out)
    assert made.engine == "transformers"
    assert compressor.verify(out)["ok"]
    found = compressor.inspect(str(out))
    assert found["engine"] == "transformers" and found["parameters"] > 0
    card = (out / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert "AutoModelForCausalLM.from_pretrained(DIR)" in code
    exec(code.replace("DIR", repr(str(out))), {"__name__": "card"})
    engine = compressor.open_engine(out)
    assert engine.name == "transformers"
    assert len(compressor.generate(engine, [2, 10, 11], 4)) == 7


@pytest.mark.parametrize(
    ("method", "settings", "what"),
    [
        (rtn, {"bits": 4, "group": 16}, "embed_tokens"),
        (nf4, {"group": 16}, "codebook"),
        (None, {}, "none of this model is quantized"),
    ],
)
def test_what_it_cannot_express_is_refused(pico_llama, make_work, tmp_path, method, settings, what):
    model = pico_llama()
    if method:
        method.run(model, method.Options(**settings), make_work())
    with pytest.raises(CompressError, match=what) as error:
        export.run(model, export.Options(), tmp_path)
    assert error.value.hint and not (tmp_path / "config.json").exists()
