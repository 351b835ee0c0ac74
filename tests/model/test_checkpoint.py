"""What is saved loads back, in our loader and in plain transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from compressor.errors import CompressError
from compressor.model.checkpoint import load_directory
from compressor.model.model import Pooling, pool
from compressor.model.saving import save
from compressor.model.shrink import Kept, shrink
from compressor.model.side_files import copy_side_files
from compressor.quantize import rtn
from families import pico


def stored(model, folder):
    folder.mkdir()
    model.module.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


def test_side_files_travel_and_code_does_not(pico_bert, tmp_path):
    parent = stored(pico_bert(), tmp_path / "parent")
    (parent / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 999, "pooling_mode_mean_tokens": True}
    (parent / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    places = {"Transformer": "", "Pooling": "1_Pooling"}
    listing = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in places.items()
    ]
    (parent / "modules.json").write_text(json.dumps(listing))
    (parent / "code.py").write_text("")
    (parent / "pytorch_model.bin").write_text("")
    model = load_directory(parent)
    assert model.pooling == Pooling("mean", normalize=False)
    child = tmp_path / "child"
    child.mkdir()
    save(model, child, parent)
    assert not (child / "code.py").exists() and not (child / "pytorch_model.bin").exists()
    kept = json.loads((child / "1_Pooling" / "config.json").read_text())
    assert kept["word_embedding_dimension"] == 32
    assert AutoTokenizer.from_pretrained(child)("a b").input_ids
    again, plain = load_directory(child), AutoModel.from_pretrained(child)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name])
        assert torch.equal(tensor, plain.state_dict()[name])


def test_bfloat16_sources_stay_bfloat16_and_tied(pico_llama, tmp_path):
    model = pico_llama(tie_word_embeddings=True)
    folder = stored(model, tmp_path / "parent")
    model.module.to(torch.bfloat16).save_pretrained(folder)
    loaded = load_directory(folder)
    assert loaded.source_dtype == "bfloat16"
    assert next(loaded.module.parameters()).dtype == torch.float32
    child = tmp_path / "child"
    child.mkdir()
    save(loaded, child, folder)
    plain = AutoModelForCausalLM.from_pretrained(child)
    assert plain.dtype == torch.bfloat16
    assert plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()


def test_a_pooler_that_was_never_stored_is_dropped(pico_bert, tmp_path):
    model = pico_bert()
    model.module.pooler = None
    loaded = load_directory(stored(model, tmp_path / "bert"))
    assert loaded.module.pooler is None


def test_quantized_checkpoints_are_refused_by_plain_transformers(pico_llama, make_work, tmp_path):
    model = pico_llama(tie_word_embeddings=True)
    parent = stored(model, tmp_path / "parent")
    rtn.run(model, rtn.Options(bits=4, group=16, embeddings=True), make_work())
    child = tmp_path / "child"
    child.mkdir()
    save(model, child, parent)
    again = load_directory(child, model.formats)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(model.module(ids).logits, again.module(ids).logits)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(child)


def test_pooling_matches_its_definition():
    hidden = torch.randn(2, 4, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    mean = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)])
    assert torch.allclose(pool(hidden, mask, Pooling("mean", False)), mean)
    unit = pool(hidden, mask, Pooling("mean", True)).norm(dim=-1)
    assert torch.allclose(unit, torch.ones(2).double())
    assert torch.equal(pool(hidden, mask, Pooling("cls", False)), hidden[:, 0])
    assert torch.equal(pool(hidden, mask, Pooling("max", False))[0], hidden[0, :2].amax(0))


def test_an_unknown_class_is_refused(pico_llama, tmp_path):
    folder = stored(pico_llama(), tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MyOwnModel"]}))
    with pytest.raises(CompressError, match="no class 'MyOwnModel'"):
        load_directory(folder)


@pytest.mark.parametrize("name", ["BertForTokenClassification", "BertForPreTraining"])
def test_a_head_without_a_task_is_refused(pico_bert, tmp_path, name):
    import transformers

    cls = getattr(transformers, name)
    cls(pico_bert().config).save_pretrained(tmp_path)
    with pytest.raises(CompressError, match=f"{name} are not supported, only BertModel, BertFor"):
        load_directory(tmp_path)


def test_a_class_of_another_architecture_is_refused(pico_bert, tmp_path):
    folder = stored(pico_bert(), tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    with pytest.raises(CompressError, match="LlamaModel are not supported"):
        load_directory(folder)


def test_quantized_checkpoints_keep_the_dtype_of_their_source(pico_llama, make_work, tmp_path):
    model = pico_llama()
    parent = stored(model, tmp_path / "parent")
    model.source_dtype = "bfloat16"
    rtn.run(model, rtn.Options(bits=4, group=16, symmetric=False, embeddings=False), make_work())
    child = tmp_path / "child"
    child.mkdir()
    save(model, child, parent)
    dtypes = {name: t.dtype for name, t in load_file(child / "packed.safetensors").items()}
    assert dtypes.pop("model.embed_tokens.weight") == torch.bfloat16
    wanted = {"codes_OI": torch.uint8, "scale_OG": torch.float16, "weight": torch.bfloat16}
    wanted["zero_OG"] = torch.uint8
    assert all(dtype == wanted[name.rpartition(".")[2]] for name, dtype in dtypes.items())
    again = load_directory(child, model.formats)
    assert again.source_dtype == "bfloat16"
    assert {p.dtype for p in again.module.parameters()} == {torch.float32}
    first, second = model.module.model.norm.weight, again.module.model.norm.weight
    assert torch.equal(first.bfloat16().float(), second)


def test_private_files_of_the_parent_stay_where_they_are(pico_bert, tmp_path):
    parent = stored(pico_bert(), tmp_path / "parent")
    (parent / "2_Normalize").mkdir()
    (parent / "notes").mkdir()
    private = ("secret_notes.txt", "trainer_state.json", "notes/tokenizer.json", "my.model")
    for name in (*private, "2_Normalize/config.json", "chat_template.jinja"):
        (parent / name).write_text("{}")
    child = tmp_path / "child"
    child.mkdir()
    copy_side_files(parent, child)
    copied = {f.relative_to(child).as_posix() for f in child.rglob("*") if f.is_file()}
    assert copied == {"2_Normalize/config.json", "chat_template.jinja"} | {
        *("tokenizer.json", "tokenizer_config.json")
    }


def test_a_strict_generation_config_is_no_obstacle(pico_llama, tmp_path):
    """Real checkpoints carry settings that transformers loads and refuses to save."""
    parent, target = tmp_path / "parent", tmp_path / "target"
    model = pico_llama()
    model.module.save_pretrained(parent)
    odd = {"temperature": 0.9, "top_p": 0.6}
    (parent / "generation_config.json").write_text(json.dumps(odd))
    target.mkdir()
    save(load_directory(parent), target, parent)
    assert json.loads((target / "generation_config.json").read_text()) == odd


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_model_without_its_pooler_can_be_cut(name, tmp_path):
    model = pico(name, head=False)
    model.base.pooler = None
    model.module.save_pretrained(tmp_path)
    loaded = load_directory(tmp_path)
    assert loaded.base.pooler is None
    sizes = loaded.sizes | {"layers": 2, "mlp": 24}
    shrink(loaded, Kept.first(loaded, sizes))
    assert loaded.sizes == sizes
