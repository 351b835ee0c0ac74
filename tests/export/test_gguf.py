"""export.gguf: codes that are moved and never rounded, against transformers' own reader of GGUF."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import compressor
from compressor.engines import llama_session
from compressor.engines.gguf import FILE, GgufEngine, open_file, tensors_of, value
from compressor.errors import CompressError
from compressor.export import gguf as export
from compressor.export import gguf_fit, gguf_names
from compressor.model.forward import outputs
from compressor.model.layers import QuantLinear
from compressor.model.manifest import WeightFormat, list_files, write_manifest
from compressor.model.probe import largest_difference, probe_batches, read_probe
from compressor.model.shapes import empty_model
from compressor.prune import magnitude
from compressor.quantize import nf4, rtn
from compressor.run.gate import open_and_check
from compressor.run.prove import save_and_prove
from families import pico

gguf = pytest.importorskip("gguf", reason="pip install 'compress[gguf]'")
# what transformers 5.23 reads; of GPT-NeoX and BERT it has no reader
PEERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")


@pytest.fixture(autouse=True)
def read_back_only(monkeypatch):
    """llama.cpp has tests of its own; here files are read back, wherever it is installed."""
    monkeypatch.setattr(export, "installed", lambda name: False)


def made(model, out, **options):
    out.mkdir(exist_ok=True)
    return export.run(model, export.Options(**options), out)


def quantized(model, make_work, **options):
    rtn.run(model, rtn.Options(**{"group": 32, "uneven": "channel"} | options), make_work())
    return model


@pytest.mark.parametrize("name", PEERS)
def test_plain_transformers_reads_the_same_model(name, tmp_path):
    model = pico(name)
    made(model, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=FILE, config=model.config, dtype=torch.float32
    ).eval()
    for inputs, expected in read_probe(tmp_path):
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            found = {"logits": peer(**inputs, position_ids=positions).logits}
        assert largest_difference(expected, found, inputs["attention_mask"])["logits"] < 1e-6


@pytest.mark.parametrize("name", ["mistral", "gpt_neox", "bert"])
def test_read_back_bit_for_bit(name, tmp_path):
    model = pico(
        name, head=name != "bert", **({"sliding_window": None} if name == "mistral" else {})
    )
    made(model, tmp_path)
    again = GgufEngine(tmp_path)
    for batch in probe_batches(model):
        wanted, found = outputs(model, batch), again.outputs(batch)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_rows_of_a_head_are_those_that_llama_cpp_rotates(tmp_path):
    """Row 2i and 2i + 1 of the file rotate together: i and i + half of ours."""
    model = pico("llama")
    made(model, tmp_path)
    stored = value(tensors_of(open_file(tmp_path / FILE))["blk.1.attn_k.weight"])
    own = model.module.model.layers[1].self_attn.k_proj.weight  # 2 heads of 8
    for head in (0, 1):
        for i in range(4):
            assert torch.equal(stored[8 * head + 2 * i], own[8 * head + i])
            assert torch.equal(stored[8 * head + 2 * i + 1], own[8 * head + i + 4])


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"bits": 8}, "q8_0"),
        ({"bits": 4}, "q4_0"),
        ({"bits": 4, "symmetric": False}, "q5_0"),
        ({"bits": 3, "symmetric": False}, "q4_0"),
        ({"bits": 2}, "q4_0"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_codes_are_moved_bit_for_bit(make_work, tmp_path, settings, kind, tied):
    model = quantized(
        pico("llama", intermediate_size=64, tie_word_embeddings=tied), make_work, **settings
    )
    artifact = made(model, tmp_path)
    stored = tensors_of(open_file(tmp_path / FILE))
    kinds = {stored[name].tensor_type.name.lower() for name in stored if "norm" not in name}
    assert kind in kinds and kinds <= {kind, "q4_0", "q4_1"}
    assert ("output.weight" in stored) == (not tied)
    again = GgufEngine(tmp_path).model.module
    tables = {n: m for n, m in model.module.named_modules() if isinstance(m, QuantLinear)}
    assert len(tables) >= 21
    for name, table in tables.items():
        assert torch.equal(again.get_submodule(name).weight, table.weight), name
    assert artifact.manifest.formats == model.formats
    assert artifact.manifest.metrics["rounded_tensors"] == 0
    found = open_and_check("gguf", tmp_path, artifact.manifest.formats.values())
    assert found.ok and found.tolerance == 1e-4


def test_tables_that_llama_cpp_adds_in_float_keep_no_codes(make_work, tmp_path):
    """It ends the process where a table of positions or token types holds blocks."""
    model = quantized(pico("bert", head=False, intermediate_size=64), make_work, bits=8)
    assert "embeddings.token_type_embeddings" in model.formats
    artifact = made(model, tmp_path)
    stored = tensors_of(open_file(tmp_path / FILE))
    for name in ("token_types.weight", "position_embd.weight"):
        assert stored[name].tensor_type.name == "F32"
    assert stored["token_embd.weight"].tensor_type.name == "Q8_0"
    assert "embeddings.token_type_embeddings" not in artifact.manifest.formats
    assert artifact.manifest.metrics["rounded_tensors"] == 0
    assert open_and_check("gguf", tmp_path, artifact.manifest.formats.values()).ok


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_float_types_round_as_torch_does(make_work, tmp_path, kind, dtype):
    model = quantized(pico("llama", intermediate_size=64), make_work, bits=4)
    artifact = made(model, tmp_path, type=kind)
    again = GgufEngine(tmp_path).model.module
    wanted = model.module.model.layers[0].mlp.up_proj.weight.to(dtype).float()
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, wanted)
    norm = model.module.model.norm.weight
    assert torch.equal(again.model.norm.weight, norm)
    assert artifact.manifest.formats == {} and artifact.manifest.metrics["rounded_tensors"]


def test_float_weights_of_layers_that_round_activations(make_work, tmp_path):
    model = quantized(pico("llama"), make_work, bits=8, group=None, activation="token")
    artifact = made(model, tmp_path / "out", type="f32")
    assert artifact.manifest.metrics["float_activations"] == 22
    assert open_and_check("gguf", tmp_path / "out", artifact.manifest.formats.values()).ok
    again = GgufEngine(tmp_path / "out").model.module
    wanted = model.module.model.layers[2].mlp.down_proj.weight
    assert torch.equal(again.model.layers[2].mlp.down_proj.weight, wanted)


@pytest.mark.parametrize("kind", ["q8_0", "q5_0", "q4_0"])
def test_requantized_is_what_the_library_makes_and_said(tmp_path, kind):
    model = pico("llama")  # 48 inputs of down_proj are no whole blocks
    artifact = made(model, tmp_path, requantize=kind)
    stored = tensors_of(open_file(tmp_path / FILE))
    own = model.module.model.layers[0].mlp.up_proj.weight.detach().numpy()
    wanted = gguf.quants.quantize(own, gguf.GGMLQuantizationType[kind.upper()])
    assert (stored["blk.0.ffn_up.weight"].data == wanted).all()
    assert stored["blk.0.ffn_down.weight"].tensor_type.name == "F32"
    assert artifact.manifest.metrics["requantized"] == kind
    form = artifact.manifest.formats["model.layers.0.mlp.up_proj"]
    assert form == WeightFormat(bits=int(kind[1]), group=32)
    assert "model.layers.0.mlp.down_proj" not in artifact.manifest.formats


@pytest.mark.parametrize(
    ("settings", "options", "what", "hint"),
    [
        ({"bits": 8, "symmetric": False}, {}, "no block .* 8 bits with zero points", "symmetric"),
        ({"bits": 4, "group": 16}, {}, "have 32 inputs, .* groups of 16", "group: 32"),
        ({"bits": 8}, {"type": "q4_0"}, "q4_0 does not hold 8 bits", "type=q8_0"),
        ({"bits": 8, "group": None, "activation": "token"}, {}, "rounds activations", "activation"),
        (None, {"type": "q8_0"}, "none of this model is quantized", "requantize=q8_0"),
        ("nf4", {}, "'model.* has a codebook", "bits: 8 or 4"),
    ],
)
def test_what_no_block_holds_is_refused(make_work, tmp_path, settings, options, what, hint):
    model = pico("llama", intermediate_size=64)
    if settings == "nf4":
        nf4.run(model, nf4.Options(group=32), make_work())
    elif settings:
        rtn.run(model, rtn.Options(**{"group": 32} | settings), make_work())
    with pytest.raises(CompressError, match=what) as error:
        made(model, tmp_path / "out", **options)
    assert hint in error.value.hint and not list((tmp_path / "out").iterdir())


def test_inputs_that_are_no_whole_blocks(make_work, tmp_path):
    model = quantized(pico("llama"), make_work, bits=8)  # 48 inputs of down_proj: one scale a row
    with pytest.raises(CompressError, match=r"down_proj' has 48 inputs"):
        made(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("opt", {}, "no architecture of llama.cpp for 'opt'"),
        ("mistral", {}, "without sliding windows.* one of 8 tokens"),
        ("qwen2", {"num_attention_heads": 2, "head_dim": 8}, "heads x head_dim of qwen2"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar: 8, .* has 16"),
        ("gpt2", {"activation_function": "relu"}, "activation_function: .*, .* has relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, changes, what):
    model = pico(name, **changes)
    model.module = empty_model(type(model.module), model.config)
    with pytest.raises(CompressError, match=what) as error:
        export.refuse(model, export.Options())
    assert error.value.hint


def test_a_window_limits_the_context(tmp_path):
    artifact = made(pico("mistral", sliding_window=32), tmp_path)
    assert artifact.manifest.metrics["context"] == 32


def test_masked_language_models_are_refused():
    with pytest.raises(CompressError, match="serves bert for feature-extraction"):
        export.refuse(pico("bert"), export.Options())


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(gguf_names.importlib, "import_module", absent)
    with pytest.raises(CompressError, match="need the package gguf") as error:
        made(pico("llama"), tmp_path)
    assert error.value.hint == gguf_names.INSTALL and error.value.exit_code == 2
    monkeypatch.setattr(llama_session.importlib, "import_module", absent)
    with pytest.raises(CompressError, match="llama-cpp-python") as error:
        llama_session.bindings()
    assert "pip install" in error.value.hint


def test_k_quants_need_llama_cpp(monkeypatch):
    def absent():
        raise CompressError("llama.cpp runs through llama-cpp-python", "pip install")

    monkeypatch.setattr(export, "bindings", absent)
    with pytest.raises(CompressError, match="llama-cpp-python") as error:
        export.refuse(pico("llama"), export.Options(requantize="q4_k"))
    assert "pip install" in error.value.hint


def test_tokenizer_that_llama_cpp_lacks(pico_llama, tmp_path):
    model = pico_llama()  # one token per character, without bytes
    with pytest.raises(CompressError, match="no tokenizer that cuts text") as error:
        made(model, tmp_path)
    assert "tokenizer=none" in error.value.hint
    made(model, tmp_path, tokenizer="none")
    reader = open_file(tmp_path / FILE)
    assert reader.get_field("tokenizer.ggml.model").contents() == "no_vocab"


@pytest.fixture
def artefact(make_work, tmp_path):
    """An exported directory with its manifest, as `compress export` leaves it."""
    parent, out = tmp_path / "parent", tmp_path / "out"
    parent.mkdir()
    model = pico("llama", intermediate_size=64)
    magnitude.run(model, magnitude.Options(sparsity=0.5), make_work())
    quantized(model, make_work, bits=4)
    source = tmp_path / "source"
    source.mkdir()
    manifest = save_and_prove(model, parent, source)
    manifest.base_model.update(id="pico", sha256="0" * 64, license=None)
    manifest.files.update(list_files(parent))
    write_manifest(parent, manifest)
    compressor.export_checkpoint(str(parent), "gguf", out)
    return out


def failed(directory):
    return {c["name"]: c["detail"] for c in compressor.verify(directory)["checks"] if not c["ok"]}


def test_exported_from_a_checkpoint(artefact):
    assert failed(artefact) == {}
    card = (artefact / "README.md").read_text()
    assert "bit for bit" in card and "has not run there" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    assert len(code.strip().splitlines()) == 3
    exec(code.replace("DIR", repr(str(artefact))), {"__name__": "card"})
    found = compressor.inspect(str(artefact))
    assert found["engine"] == "gguf" and found["parameters"] > 0
    assert found["formats"]["model.layers.0.mlp.up_proj"]["pattern"] == "unstructured"
    assert found["bytes"] > (artefact / FILE).stat().st_size
    engine = compressor.open_engine(artefact)
    assert engine.name == "gguf" and len(compressor.generate(engine, [2, 10, 11], 4)) == 7


def test_a_changed_scale_is_named(artefact):
    reader = gguf.GGUFReader(artefact / FILE, "r+")
    tensor = tensors_of(reader)["blk.1.ffn_up.weight"]
    tensor.data[3, 1] ^= 4  # the high byte of a scale
    reader.data.flush()
    found = failed(artefact)
    assert "'blk.1.ffn_up.weight' changed, 1 in all" in found[FILE] and "probe" in found


def test_a_scale_that_is_no_number_is_named(artefact):
    reader = gguf.GGUFReader(artefact / FILE, "r+")
    tensors_of(reader)["blk.0.attn_v.weight"].data[0, :2] = (0, 0x7C)  # infinity
    reader.data.flush()
    assert (
        "'blk.0.attn_v.weight' of model.gguf holds what is no number" in failed(artefact)["probe"]
    )


@pytest.mark.parametrize("key", ["attention.head_count_kv", "rope.freq_base", "block_count"])
def test_changed_metadata_is_named(artefact, key):
    reader = gguf.GGUFReader(artefact / FILE, "r+")
    field = reader.get_field(f"llama.{key}")
    field.parts[field.data[0]][0] += 1
    reader.data.flush()
    assert f"llama.{key} of model.gguf is" in failed(artefact)["probe"]


def test_a_truncated_file_is_named(artefact):
    file = artefact / FILE
    file.write_bytes(file.read_bytes()[:900])
    assert "damaged" in failed(artefact)["probe"]


def test_config_and_file_must_belong_together(artefact):
    config = json.loads((artefact / "config.json").read_text())
    (artefact / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(CompressError, match=r"llama\.block_count of model\.gguf is 3"):
        GgufEngine(artefact)


def test_blocks_that_keep_no_zeros_are_refused_where_zeros_are_promised():
    model = pico("llama", hidden_size=64)
    model.formats["model.layers.0.mlp.up_proj"] = WeightFormat(pattern="2:4", sparsity=0.5)
    with pytest.raises(CompressError, match="keeps no zeros") as caught:
        gguf_fit.refuse_formats(model, "auto", "q4_k")
    assert "q4_0" in caught.value.hint
    gguf_fit.refuse_formats(model, "auto", "q4_0")
