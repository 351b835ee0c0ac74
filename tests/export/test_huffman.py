"""export.huffman: a smaller file that comes back bit for bit, or a refusal."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.errors import CompressError
from compressor.export import huffman as export
from compressor.model.checkpoint import load_directory
from compressor.model.manifest import WeightFormat, list_files, write_manifest
from compressor.model.tables import QuantTable
from compressor.quantize import nf4, rtn
from compressor.run.prove import save_and_prove
from compressor.run.quantized_size import quantized_bytes


def same_bits(model, directory):
    wanted = model.module.state_dict()
    got = load_directory(directory, model.formats).module.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def wide_llama(pico_llama, **settings):
    """Large enough that tables of lengths pay."""
    return pico_llama(intermediate_size=2048, num_hidden_layers=1, **settings)


@pytest.mark.parametrize(
    ("method", "settings", "tied"),
    [
        (rtn, {"bits": 8, "group": 32}, False),
        (rtn, {"bits": 4, "group": None, "symmetric": False}, True),
        (rtn, {"bits": 3, "group": 32}, True),
        (nf4, {"group": None}, False),
    ],
)
def test_it_comes_back(pico_llama, make_work, tmp_path, method, settings, tied):
    model = wide_llama(pico_llama, tie_word_embeddings=tied)
    options = method.Options(**settings)
    method.run(model, options, make_work())
    artifact = export.run(model, export.Options(), tmp_path)
    same_bits(model, tmp_path)
    found = artifact.manifest.metrics["huffman"]
    assert (tmp_path / "packed.safetensors").stat().st_size == found["bytes"]
    assert found["bytes"] < found["packed_bytes"]
    if method is rtn and settings["bits"] == 3:  # in our layout anyway
        float_model = wide_llama(pico_llama, tie_word_embeddings=tied)
        assert found["packed_bytes"] == quantized_bytes(float_model, options, torch.float32)


def test_small_tables_stay_packed(pico_llama, make_work, tmp_path):
    model = wide_llama(pico_llama)
    rtn.run(model, rtn.Options(bits=8, group=32), make_work())
    export.run(model, export.Options(), tmp_path)
    names = load_file(tmp_path / "packed.safetensors").keys()
    assert "model.layers.0.mlp.up_proj.codes_OI.stream" in names
    assert "model.layers.0.self_attn.k_proj.codes_OI" in names  # 512 codes


def test_exported_from_a_checkpoint(pico_llama, make_work, tmp_path):
    model, parent, source = wide_llama(pico_llama), tmp_path / "parent", tmp_path / "source"
    parent.mkdir()
    rtn.run(model, rtn.Options(bits=4, group=32), make_work())
    model.processor.save_pretrained(source)
    manifest = save_and_prove(model, parent, source)
    manifest.base_model.update(id="pico", sha256="0" * 64, license=None)
    manifest.files.update(list_files(parent))
    write_manifest(parent, manifest)
    out = tmp_path / "out"
    made = compressor.export_checkpoint(str(parent), "huffman", out)
    assert made.engine == "torch" and compressor.verify(out)["ok"]
    card = (out / "README.md").read_text()
    assert "in a Huffman code" in card and "compressor.open_engine(DIR)" in card
    engine = compressor.open_engine(out)
    assert len(compressor.generate(engine, [2, 10, 11], 4)) == 7
    assert compressor.inspect(str(out))["parameters"] == manifest.metrics["parameters"]


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("stream", lambda t: t[:-1].clone(), "not as long"),
        ("lengths", lambda t: torch.ones_like(t), "no code has such lengths"),
        ("lengths", lambda t: t[:-1].clone(), "15 lengths for codes of 4 bits"),
        ("chunks", lambda t: t.int(), "other types"),
        ("chunks", None, "a part of it is missing"),
    ],
)
def test_damage_is_named(pico_llama, make_work, tmp_path, part, change, said):
    model = wide_llama(pico_llama)
    rtn.run(model, rtn.Options(bits=4, group=32), make_work())
    export.run(model, export.Options(), tmp_path)
    file, name = tmp_path / "packed.safetensors", f"model.layers.0.mlp.up_proj.codes_OI.{part}"
    tensors = load_file(file)
    old = tensors.pop(name)
    if change is not None:
        tensors[name] = change(old)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CompressError, match=said):
        load_directory(tmp_path, model.formats)


def test_what_gets_no_smaller_is_refused(pico_llama, make_work, tmp_path):
    model = wide_llama(pico_llama)
    with pytest.raises(CompressError, match="none of this model is quantized"):
        export.refuse({"lm_head": WeightFormat(pattern="2:4")})
    rtn.run(model, rtn.Options(bits=2, group=32), make_work())
    for module in model.module.modules():
        if isinstance(module, QuantTable):  # every code as often as every other
            codes = torch.arange(module.codes_OI.numel()).view(module.codes_OI.shape) % 4
            module.codes_OI.copy_(codes)
    with pytest.raises(CompressError, match="about equally often"):
        export.run(model, export.Options(), tmp_path)
