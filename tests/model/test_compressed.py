"""Quantized checkpoints in the layout of compressed-tensors: plain transformers opens them."""

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import unpack_from_int32
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import compressor
from compressor.errors import CompressError
from compressor.model.checkpoint import Checkpoint, load_directory
from compressor.model.compressed_config import obstacle, quantization_config
from compressor.model.forward import output_mask, outputs
from compressor.model.layers import QuantEmbedding, QuantLinear
from compressor.model.manifest import WeightFormat, list_files, write_manifest
from compressor.model.model import Model
from compressor.model.probe import largest_difference, probe_batches
from compressor.model.saving import save
from compressor.quantize import rtn
from compressor.run.prove import save_and_prove
from families import pico

FLOAT_TABLES = {"embeddings": False, "head": False}


@pytest.fixture
def stored(make_work, tmp_path):
    """Factory: quantize a model, save it; (model, directory)."""

    def build(model, **settings):
        parent, child = tmp_path / "parent", tmp_path / "child"
        parent.mkdir()
        child.mkdir()
        rtn.run(model, rtn.Options(**{"group": 16} | settings), make_work())
        save(model, child, parent)
        return model, child

    return build


def same_bits(model, directory):
    wanted = model.module.state_dict()
    got = load_directory(directory, model.formats).module.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def plain_error(model, directory, auto, **settings):
    """Relative error of what plain transformers computes with the directory."""
    loaded, report = auto.from_pretrained(directory, output_loading_info=True, **settings)
    assert not any(report.values()), report
    plain, worst = Model(loaded.eval(), model.family, None), 0.0
    for batch in probe_batches(model):
        found = largest_difference(outputs(model, batch), outputs(plain, batch), output_mask(batch))
        worst = max(worst, *found.values())
    return worst


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 8},
        {"bits": 8, "symmetric": False},
        {"bits": 8, "group": None, "activation": "dynamic"},
        {"bits": 4, **FLOAT_TABLES},
        {"bits": 3, "group": None, **FLOAT_TABLES},
        {"bits": 2, **FLOAT_TABLES},
    ],
)
def test_plain_transformers_loads_a_decoder(pico_llama, stored, settings, tied):
    model, directory = stored(pico_llama(tie_word_embeddings=tied), **settings)
    same_bits(model, directory)
    assert plain_error(model, directory, AutoModelForCausalLM) < 1e-5


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 4, **FLOAT_TABLES}])
def test_plain_transformers_loads_an_encoder(pico_bert, stored, settings):
    model, directory = stored(pico_bert(), **settings)
    same_bits(model, directory)
    assert plain_error(model, directory, AutoModel) < 1e-5


def test_activations_per_token_and_static(pico_llama, make_work, tmp_path):
    """Per token the library divides by 127.5 where we divide by 127: equal up to that rounding."""
    model = pico_llama()
    options = rtn.Options(bits=8, group=None, activation="token", **FLOAT_TABLES)
    rtn.run(model, options, make_work())
    name = "model.layers.1.mlp.down_proj"
    static = {"bits": 8, "per": "tensor", "dynamic": False}
    form = replace(model.formats[name], activation=static)
    before = model.module.get_submodule(name)
    layer = QuantLinear(48, 32, form)
    grid = {"input_scale": torch.tensor(0.037), "input_zero": torch.tensor(201, dtype=torch.uint8)}
    layer.fill(codes_OI=before.codes_OI, scale_OG=before.scale_OG, zero_OG=before.zero_OG, **grid)
    model.module.set_submodule(name, layer.eval())
    model.formats[name] = form
    save(model, tmp_path, tmp_path)
    same_bits(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors[f"{name}.input_scale"].tolist() == [grid["input_scale"].item()]
    assert tensors[f"{name}.input_zero_point"].tolist() == [201 - 128]
    assert 1e-5 < plain_error(model, tmp_path, AutoModelForCausalLM) < 0.1
    scaled = replace(form, activation=static | {"scaled": True})
    found = obstacle(model.module, {name: scaled})
    assert found is not None and "unfolded: plain" in found.hint


@pytest.mark.parametrize("name", ["vit", "t5", "gemma3_text"])  # renamed, tied four times, scaled
def test_names_of_other_families(name, stored):
    autos = {"vit": AutoModel, "t5": AutoModelForSeq2SeqLM, "gemma3_text": AutoModelForCausalLM}
    settings = {"bits": 4, **FLOAT_TABLES} if name != "t5" else {"bits": 8}
    model, directory = stored(pico(name, head=name != "vit"), **settings)
    same_bits(model, directory)
    assert plain_error(model, directory, autos[name]) < 1e-5


def test_a_half_precision_source_loses_nothing_in_float32(pico_llama, make_work, tmp_path):
    model = pico_llama()
    model.source_dtype = "bfloat16"
    rtn.run(model, rtn.Options(bits=4, group=16, **FLOAT_TABLES), make_work())
    save(model, tmp_path, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    scales = [n for n in load_file(tmp_path / "model.safetensors") if n.endswith("weight_scale")]
    assert len(scales) == 21
    again = load_directory(tmp_path, model.formats)
    assert plain_error(again, tmp_path, AutoModelForCausalLM, dtype=torch.float32) < 1e-5


@pytest.mark.parametrize("bits", [8, 3])
def test_tensors_are_those_of_the_library(pico_llama, stored, bits):
    """Their own unpacking gives our codes; weights beside them are stored as always."""
    model, directory = stored(pico_llama(), bits=bits, **FLOAT_TABLES)
    tensors, name = load_file(directory / "model.safetensors"), "model.layers.1.mlp.down_proj"
    layer = model.module.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    packed = tensors[f"{name}.weight_packed"]
    assert packed.dtype == torch.int32 and packed.shape == (32, -(-48 * bits // 32))
    assert tensors[f"{name}.weight_shape"].tolist() == [32, 48]
    codes = unpack_from_int32(packed, bits, torch.Size([32, 48])).int() + 2 ** (bits - 1)
    assert torch.equal(codes, layer.codes_OI.int())
    scale = tensors[f"{name}.weight_scale"]
    assert scale.dtype == torch.float16 and torch.equal(scale, layer.scale_OG)
    assert torch.equal(tensors["lm_head.weight"], model.module.lm_head.weight)


def test_zero_points_are_signed(pico_llama, stored):
    model, directory = stored(pico_llama(tie_word_embeddings=True), bits=8, symmetric=False)
    tensors = load_file(directory / "model.safetensors")
    table = model.module.get_input_embeddings()
    assert isinstance(table, QuantEmbedding)
    signed, zero = (tensors[f"model.embed_tokens.{n}"] for n in ("weight", "weight_zero_point"))
    assert torch.equal(signed.int() + 128, table.codes_OI.int())
    assert torch.equal(zero.int() + 128, table.zero_OG.int())
    assert "lm_head.weight" not in tensors and "lm_head.weight_scale" in tensors


def test_bits_differ_from_layer_to_layer(pico_llama, make_work, tmp_path):
    """Several groups: what was left float is listed, what is sparse keeps its zeros."""
    model = pico_llama()
    weight = model.module.model.layers[2].mlp.up_proj.weight
    weight.data[:, ::2] = 0
    model.formats["model.layers.2.mlp.up_proj"] = WeightFormat(pattern="2:4", sparsity=0.5)
    rtn.run(model, rtn.Options(bits=4, group=16, **FLOAT_TABLES), make_work())
    finer = pico_llama()
    rtn.run(finer, rtn.Options(bits=8, group=None, **FLOAT_TABLES), make_work())
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        model.module.set_submodule(name, finer.module.get_submodule(name))
        model.formats[name] = finer.formats[name]
    save(model, tmp_path, tmp_path)
    same_bits(model, tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    groups = stated["config_groups"].values()
    assert sorted((g["weights"]["num_bits"], len(g["targets"])) for g in groups) == [
        (4, 19),
        (8, 2),
    ]
    assert stated["ignore"] == ["lm_head"]
    assert plain_error(model, tmp_path, AutoModelForCausalLM) < 1e-5
    again = load_directory(tmp_path, model.formats).module.get_submodule(
        "model.layers.2.mlp.up_proj"
    )
    assert not again.weight[:, ::2].any()


@pytest.mark.parametrize(
    ("settings", "what", "hint"),
    [
        ({"bits": 4}, "embed_tokens': transformers loads it with 8", "embeddings: false"),
        ({"bits": 4, "symmetric": False, **FLOAT_TABLES}, "zero points of 4 bits", "symmetric"),
    ],
)
def test_what_it_cannot_express_stays_in_our_layout(pico_llama, stored, settings, what, hint):
    model, directory = stored(pico_llama(), **settings)
    assert not (directory / "model.safetensors").exists()
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    same_bits(model, directory)
    found = obstacle(model.module, model.formats)
    assert found is not None and what in found.what and hint in found.hint


@pytest.mark.parametrize(
    ("form", "what"),
    [
        (WeightFormat(bits=4, codebook="nf4", group=16), "codebook"),
        (WeightFormat(bits=8, side_rank=4), "side path"),
        (WeightFormat(bits=4, group=16), None),
        (WeightFormat(pattern="2:4"), None),
    ],
)
def test_formats_without_weights_are_enough_to_tell(pico_llama, form, what):
    found = obstacle(pico_llama().module, {"model.layers.0.mlp.up_proj": form})
    assert (found is None) == (what is None)
    assert found is None or (what in found.what and found.hint)


def test_gpt2_stays_in_our_layout(stored):
    model, directory = stored(pico("gpt2"), bits=8)
    assert (directory / "packed.safetensors").is_file()
    same_bits(model, directory)


def test_verify_and_inspect_know_the_layout(pico_llama, make_work, tmp_path):
    model = pico_llama()
    rtn.run(model, rtn.Options(bits=4, group=16, **FLOAT_TABLES), make_work())
    manifest = save_and_prove(model, tmp_path, tmp_path)
    assert manifest.metrics["layout"] == {"name": "compressed-tensors"}
    manifest.files.update(list_files(tmp_path))
    write_manifest(tmp_path, manifest)
    report = compressor.verify(tmp_path)
    assert report["ok"], report
    found = compressor.inspect(str(tmp_path))
    assert found["parameters"] == found["metrics"]["parameters"]
    assert found["bytes"] < 60_000 and found["dtype"] == "float32"
    config = Checkpoint.open(tmp_path).load().module.config
    assert not hasattr(config, "quantization_config")


def test_a_foreign_directory_of_the_same_layout_is_refused(pico_llama, stored):
    _, directory = stored(pico_llama(), bits=8)
    with pytest.raises(CompressError, match="already quantized by compressed-tensors"):
        load_directory(directory)


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("weight_packed", lambda t: t[:, :-1].contiguous(), "where the model has torch.int32"),
        ("weight_scale", lambda t: t.float(), "where the model has torch.float16"),
        ("weight_shape", None, None),
        ("weight_scale", None, "missing"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(pico_llama, stored, key, change, said):
    model, directory = stored(pico_llama(), bits=4, **FLOAT_TABLES)
    file, name = directory / "model.safetensors", f"model.layers.0.mlp.up_proj.{key}"
    tensors = load_file(file)
    tensors = {k: v for k, v in tensors.items() if k != name} | (
        {name: change(tensors[name])} if change else {}
    )
    save_file(tensors, file, {"format": "pt"})
    if said is None:  # our formats say the shape, which only the library reads
        same_bits(model, directory)
        return
    with pytest.raises(CompressError, match=said):
        load_directory(directory, model.formats)


def test_pieces_and_their_index(pico_llama, make_work, tmp_path):
    model = pico_llama()
    rtn.run(model, rtn.Options(bits=8, group=16), make_work())
    save(model, tmp_path, tmp_path, shard=4000)
    assert len(list(tmp_path.glob("model-0*.safetensors"))) > 3
    same_bits(model, tmp_path)
    assert plain_error(model, tmp_path, AutoModelForCausalLM) < 1e-5


def test_the_description_is_the_librarys_own(pico_llama, stored):
    from compressed_tensors.quantization import QuantizationConfig

    model, directory = stored(pico_llama(), bits=8, group=None, activation="dynamic")
    stated = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert stated == quantization_config(model.module, model.formats)
    read = QuantizationConfig.model_validate(stated)
    forms = {str(scheme.format): scheme for scheme in read.config_groups.values()}
    activation = forms["int-quantized"].input_activations
    assert (activation.num_bits, activation.dynamic, activation.strategy) == (8, True, "tensor")
    assert forms["naive-quantized"].targets == ["model.embed_tokens"]
