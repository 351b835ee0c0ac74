"""The directory that onnxruntime-genai runs: its own loop against torch, and what is refused."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
import torch

from compressor import engines
from compressor.engines import genai as library
from compressor.engines import installed, onnx_session
from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError
from compressor.export import genai as export
from compressor.model.probe import read_probe
from compressor.quantize import rtn
from compressor.run.card_usage import usage
from compressor.run.gate import check_agreement
from compressor.screen import Silent
from conftest import character_tokenizer
from families import pico

needs_genai = pytest.mark.skipif(
    not installed("onnxruntime-genai"), reason="onnxruntime-genai is not installed"
)


def exported(model, out):
    out.mkdir()
    return export.run(model, export.Options(), out)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A pico Llama of 4 bits, with a tied table, and its directory."""
    model = pico("llama", num_hidden_layers=2, tie_word_embeddings=True)
    rtn.run(
        model,
        rtn.Options(bits=4, group=16, embeddings=True),
        SimpleNamespace(progress=Silent().progress),
    )
    out = tmp_path_factory.mktemp("genai") / "out"
    return model, exported(model, out)


def test_the_config_names_what_the_graph_has(served):
    model, artifact = served
    config = json.loads((artifact.path / library.CONFIG).read_text())["model"]
    graph = onnx.load(artifact.path / "model.onnx").graph
    inputs, outputs = config["decoder"]["inputs"], config["decoder"]["outputs"]
    layers = range(config["decoder"]["num_hidden_layers"])

    def spelled(names):
        return {n % i if "%d" in n else n for n in names.values() for i in layers}

    assert spelled(inputs) == {i.name for i in graph.input}
    assert spelled(outputs) == {o.name for o in graph.output}
    shapes = {i.name: i.type.tensor_type.shape.dim for i in graph.input}
    cache = shapes["past_key_values.0.key"]
    heads, width = config["decoder"]["num_key_value_heads"], config["decoder"]["head_size"]
    assert (cache[1].dim_value, cache[3].dim_value) == (heads, width) == (2, 8)
    assert (config["eos_token_id"], config["pad_token_id"], config["vocab_size"]) == (3, 0, 96)
    assert artifact.manifest.formats == model.formats


@needs_genai
def test_its_loop_writes_what_torch_writes(served):
    model, artifact = served
    assert artifact.engine == "onnxruntime-genai"
    engine = library.GenaiEngine(artifact.path, threads=1)
    found = check_agreement(engine, model.formats.values(), artifact.path)
    assert found.ok and found.exact is not None and found.exact.greedy.equal == 16
    assert set(found.errors) == {"logits", "continuation"}
    # rows of several lengths, padded in front, and steps behind them
    ids = torch.randint(5, 96, (2, 9), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][1, :4] = 0
    exact = library.GenaiEngine(artifact.path, exact=True)
    torch_engine = TorchEngine.of(model, artifact.path)
    (got, cache), (wanted, own) = exact.prefill(batch), torch_engine.prefill(batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], wanted[real], atol=1e-4, rtol=1e-4)
    for token in (7, 50):
        step = torch.tensor([[token], [9]])
        (got, cache), (wanted, own) = exact.decode(step, cache), torch_engine.decode(step, own)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@needs_genai
def test_a_wrong_config_is_found(served, tmp_path):
    model, artifact = served
    out = tmp_path / "wrong"
    shutil.copytree(artifact.path, out)
    config = json.loads((out / library.CONFIG).read_text())
    given = config["model"]["decoder"]["inputs"]
    names = given["past_key_names"], given["past_value_names"]
    given["past_value_names"], given["past_key_names"] = names
    (out / library.CONFIG).write_text(json.dumps(config))
    found = check_agreement(library.GenaiEngine(out), model.formats.values(), out)
    assert "continuation" in found.failure


@needs_genai
def test_the_lines_of_the_card_run(served, capsys):
    _, artifact = served
    character_tokenizer().save_pretrained(artifact.path)
    manifest = replace(artifact.manifest, engine="onnxruntime-genai")
    exec(usage(manifest, "causal-lm"), {"DIR": str(artifact.path)})
    assert capsys.readouterr().out.startswith("<s>")


def test_without_the_library_onnx_runtime_proves_it(pico_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda module: None)
    artifact = exported(pico_llama(num_hidden_layers=1), tmp_path / "out")
    assert artifact.engine == "onnxruntime"
    assert "pip install" in artifact.manifest.metrics["genai"]["not_run"]
    with pytest.raises(CompressError, match="is not installed") as error:
        library.GenaiEngine(tmp_path / "out")
    assert "pip install" in error.value.hint


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_what_writes_no_text_alone_is_refused_by_name(name, tmp_path):
    model = pico(name)
    with pytest.raises(CompressError, match=f"this {name} is for {model.task}") as error:
        exported(model, tmp_path / "out")
    assert error.value.hint == "use export.onnx" and not list((tmp_path / "out").iterdir())


def test_a_directory_without_the_config_is_refused(tmp_path):
    with pytest.raises(CompressError, match=r"no genai_config\.json"):
        library.GenaiEngine(tmp_path)


@needs_genai
def test_a_text_that_ends_early(served, tmp_path):
    """The token that torch writes third is made the one that ends a text."""
    model, artifact = served
    out = tmp_path / "ends"
    shutil.copytree(artifact.path, out)
    exact = library.GenaiEngine(artifact.path, exact=True)
    prompt = read_probe(out)[0][0]["input_ids"][0].tolist()
    text = exact.generate(prompt, 16)
    config = json.loads((out / library.CONFIG).read_text())
    config["model"]["eos_token_id"] = [3, text[2]]
    (out / library.CONFIG).write_text(json.dumps(config))
    ending = library.GenaiEngine(out, exact=True)
    assert ending.generate(prompt, 16) == text[: text.index(text[2])]
    assert check_agreement(library.GenaiEngine(out), model.formats.values(), out).ok


@needs_genai
def test_a_graph_in_memory_lives_until_it_is_loaded(served, monkeypatch):
    """The library keeps a pointer to the bytes and no copy; freed, they once were overwritten."""
    import onnxruntime_genai

    gone, seen = [], []

    class Given(bytes):
        def __del__(self):
            gone.append(True)

    real, load = onnx_session.float_activations, onnxruntime_genai.Model
    monkeypatch.setattr(onnx_session, "float_activations", lambda file: Given(real(file)))
    monkeypatch.setattr(
        onnxruntime_genai, "Model", lambda config: (seen.append(list(gone)), load(config))[1]
    )
    library.GenaiEngine(served[1].path, exact=True)
    assert seen == [[]] and gone == [True]
