"""Streamed files are those of the safetensors library and of transformers, byte for byte."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, ViTConfig

from compressor.errors import CompressError
from compressor.model.checkpoint import load_directory
from compressor.model.saving import save
from compressor.model.stored import float_state
from compressor.model.stream import Lazy, open_tensors, read_tensor, write_tensors
from compressor.quantize import rtn


def same_files(folder, other, pattern="model*"):
    names = [f.name for f in sorted(folder.glob(pattern))]
    assert names and names == [f.name for f in sorted(other.glob(pattern))]
    for name in (n for n in names if n.endswith(".safetensors")):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def vit():
    torch.manual_seed(0)
    return AutoModel.from_config(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
        )
    )


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96))


def test_every_dtype_lies_where_the_library_puts_it(tmp_path):
    kinds = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"]
    kinds += ["uint8", "bool"]
    tensors = {}
    for index, kind in enumerate(kinds):
        values = torch.arange(3 + index).to(getattr(torch, kind))
        tensors |= {f"{name}.{kind}": values.clone() for name in ("b", "a")}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), 'ü"': torch.ones(2, 2)}
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    write_tensors(tmp_path, "ours", {n: Lazy.map(lambda t: t, t) for n, t in tensors.items()})
    ours, library = (tmp_path / f"{n}.safetensors" for n in ("ours", "library"))
    assert ours.read_bytes() == library.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "tied llama", "bert", "masked bert", "vit", "gpt2"])
def test_float_models_are_stored_as_save_pretrained_does(
    pico_llama, pico_bert, tmp_path, name, dtype
):
    build = {
        "llama": lambda: pico_llama().module,
        "tied llama": lambda: pico_llama(tie_word_embeddings=True).module,
        "bert": lambda: pico_bert().module,
        "masked bert": lambda: pico_bert(head="masked-lm").module,
        "vit": vit,
        "gpt2": gpt2,
    }[name]
    module = build()
    cast = build().to(dtype)
    for shard in (10**9, 20_000):
        ours, theirs = tmp_path / f"ours{shard}", tmp_path / f"theirs{shard}"
        ours.mkdir()
        write_tensors(ours, "model", float_state(module, dtype), shard)
        cast.save_pretrained(theirs, max_shard_size=shard)
        same_files(ours, theirs)
        cast.config.save_pretrained(ours)
        plain, report = type(cast).from_pretrained(ours, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys"))
        wanted = cast.state_dict()
        assert all(torch.equal(wanted[n], t) for n, t in plain.state_dict().items())
        again = ours / "again"  # a loaded model knows what it was renamed from
        again.mkdir()
        write_tensors(again, "model", float_state(plain, dtype), shard)
        plain.save_pretrained(theirs / "again", max_shard_size=shard)
        same_files(again, theirs / "again")


def parent_of(model, folder):
    folder.mkdir()
    model.module.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


@pytest.fixture(params=["float32", "float16"])
def pieces(request, pico_llama, tmp_path):
    """A saved llama in pieces of at most 10 kB, and the model."""
    model = pico_llama(tie_word_embeddings=True)
    parent = parent_of(model, tmp_path / "parent")
    model.source_dtype = request.param
    folder = tmp_path / "pieces"
    folder.mkdir()
    save(model, folder, parent, shard=10_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    return model, folder


def test_pieces_load_in_transformers_and_here(pieces):
    model, folder = pieces
    largest = max(file.stat().st_size for file in folder.glob("model-*"))
    assert largest < 96 * 32 * 4 + 1000  # the table alone is larger than a piece may be
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert str(plain.dtype) == f"torch.{model.source_dtype}"
    ours = load_directory(folder).module.state_dict()
    for name, tensor in model.module.state_dict().items():
        rounded = tensor.to(plain.dtype)
        assert torch.equal(rounded, plain.state_dict()[name])
        assert torch.equal(rounded.float(), ours[name])


@pytest.mark.parametrize("mapped", [True, False])
def test_slices_read_what_was_written(pieces, mapped):
    _, folder = pieces
    files = sorted(folder.glob("model-*.safetensors"))
    read = open_tensors(files, mapped)
    wanted = {n: t for file in files for n, t in load_file(file).items()}
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name][...], wanted[name]) for name in wanted)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_tensor_without_elements_is_read(tmp_path, mapped):
    wanted = {"none": torch.empty(0, dtype=torch.bfloat16), "rows": torch.ones(2, 3)}
    save_file(wanted, tmp_path / "some.safetensors")
    for name, unread in open_tensors([tmp_path / "some.safetensors"], mapped).items():
        found = read_tensor(unread)
        assert found.dtype == wanted[name].dtype and torch.equal(found, wanted[name])


def refusal(folder, formats=None):
    with pytest.raises(CompressError) as caught:
        load_directory(folder, formats)
    assert "\n" not in caught.value.what and caught.value.hint
    return caught.value.what


def test_a_cut_or_missing_piece_is_refused(pieces):
    _, folder = pieces
    second = next(folder.glob("model-00002-of-*"))
    second.write_bytes(second.read_bytes()[:-10])
    assert "truncated" in refusal(folder) and second.name in refusal(folder)
    second.unlink()
    assert f"'{second.name}' is missing" in refusal(folder)


def test_an_interrupted_save_is_no_checkpoint(pieces):
    _, folder = pieces
    (folder / "model.safetensors.index.json").unlink()  # written after the last piece
    assert "holds no model.safetensors" in refusal(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_packed_weights_in_pieces(pico_llama, make_work, tmp_path, tied):
    model = pico_llama(tie_word_embeddings=tied)
    parent = parent_of(model, tmp_path / "parent")
    rtn.run(model, rtn.Options(bits=4, group=16), make_work())
    whole, folder = tmp_path / "whole", tmp_path / "pieces"
    for directory, shard in ((whole, None), (folder, 2000)):
        directory.mkdir()
        save(model, directory, parent, shard)
    assert [f.name for f in whole.glob("packed*")] == ["packed.safetensors"]
    index = json.loads((folder / "packed.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    stored = load_file(whole / "packed.safetensors")
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    wanted, got = (load_directory(d, model.formats).module.state_dict() for d in (whole, folder))
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)
    next(folder.glob("packed-00002-of-*")).unlink()
    assert "is missing" in refusal(folder, model.formats)


def test_generation_settings_come_along(pico_llama, tmp_path):
    model = pico_llama()
    parent = parent_of(model, tmp_path / "parent")
    plain = AutoModelForCausalLM.from_pretrained(parent).generation_config
    assert load_directory(parent).module.generation_config == plain
    plain.max_new_tokens = 7
    plain.save_pretrained(parent)
    assert load_directory(parent).module.generation_config.max_new_tokens == 7
    (parent / "generation_config.json").unlink()
    plain = AutoModelForCausalLM.from_pretrained(parent).generation_config
    assert load_directory(parent).module.generation_config == plain
