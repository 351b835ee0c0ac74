"""Exported pico models in ONNX Runtime: the same numbers as torch, our own codes, one table."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime import InferenceSession

from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.errors import CompressError
from compressor.export import onnx as export
from compressor.export.onnx_twin import make_twin
from compressor.model.checkpoint import load_processor, read_pooling
from compressor.model.forward import outputs
from compressor.model.layers import QuantEmbedding, QuantLinear
from compressor.model.model import Pooling
from compressor.model.probe import largest_difference, read_probe
from compressor.numerics.packing import pack
from compressor.quantize import rtn

FLOAT = 1e-5
# A sum that ends one ulp away can move an int8 activation to the next code, 1/127 of its block's
# largest value, and what follows then moves too: agreement ends at the noise of the rounding.
INTEGER = 2e-2


def exported(model, out, work=None, **quantization):
    """Quantize (when asked), export, open; agreement with the probe is always checked."""
    if quantization:
        rtn.run(model, rtn.Options(**quantization), work)
    out.mkdir()
    artifact = export.run(model, export.Options(), out)
    assert (artifact.engine, artifact.path, artifact.manifest.kind) == (
        "onnxruntime",
        out,
        "artifact",
    )
    assert artifact.manifest.formats == model.formats
    engine = OnnxRuntimeEngine(out, threads=1)
    for inputs, wanted in read_probe(out):
        errors = largest_difference(wanted, engine.outputs(inputs), inputs["attention_mask"])
        # the probe has float activations: one scale for a whole tensor is far from them
        integer = 0.1 if quantization.get("activation") else INTEGER
        assert max(errors.values()) < (integer if quantization else FLOAT), errors
    return engine


def exact_session(out):
    """The same file with float activations: what is left is codes, scales and graph."""
    file = onnx.load(out / "model.onnx")
    for node in file.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    return InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])


def initializers(out):
    graph = onnx.load(out / "model.onnx").graph
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer}


def names(values):
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }


def random_batch(rows, length, padding=0, left=False):
    ids = torch.randint(5, 96, (rows, length))
    mask = torch.ones_like(ids)
    if padding:
        mask[0, slice(0, padding) if left else slice(length - padding, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_float_encoder_with_pooling(pico_bert, tmp_path):
    model = pico_bert(pooling=Pooling("mean", True), num_hidden_layers=2)
    model.processor.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    engine = exported(model, tmp_path / "out")
    for batch in (random_batch(1, 1), random_batch(4, 9, padding=3), random_batch(2, 33)):
        wanted = outputs(model, batch)
        errors = largest_difference(wanted, engine.outputs(batch), batch["attention_mask"])
        assert set(errors) == {"last_hidden_state", "sentence_embedding"}
        assert max(errors.values()) < FLOAT
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    tokens = ["batch", "sequence"]
    given = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), tokens)
    assert names(graph.input) == given
    assert names(graph.output)["last_hidden_state"] == [*tokens, 32]
    assert not any("pooler" in t.name for t in graph.initializer)
    assert str(tmp_path.home()).encode() not in (tmp_path / "out" / "model.onnx").read_bytes()
    assert b"site-packages" not in (tmp_path / "out" / "model.onnx").read_bytes()
    assert read_pooling(tmp_path / "out") == model.pooling
    assert load_processor(tmp_path / "out")("hello")["input_ids"]


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
def test_encoder_carries_our_codes(pico_bert, make_work, tmp_path, bits, symmetric):
    model = pico_bert(num_hidden_layers=1)
    quantization = {"bits": bits, "group": 16, "symmetric": symmetric}
    exported(model, tmp_path / "out", make_work(), **quantization)
    stored = [a.tobytes() for a in initializers(tmp_path / "out").values()]
    names = [n for n in model.formats if "pooler" not in n]
    assert len(names) == 9
    for name in names:
        module = model.module.get_submodule(name)
        assert isinstance(module, QuantLinear | QuantEmbedding)
        assert pack(module.codes_OI, bits).numpy().tobytes() in stored
        assert module.scale_OG.float().numpy().tobytes() in stored
    assert model.config._attn_implementation == "sdpa"  # the model itself was left alone
    batch = random_batch(3, 7)
    given = {k: v.numpy() for k, v in batch.items()}
    got = exact_session(tmp_path / "out").run(["last_hidden_state"], given)[0]
    wanted = outputs(model, batch)["last_hidden_state"].numpy()
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < FLOAT


def test_dynamic_activations_become_integer_products(pico_bert, make_work, tmp_path):
    model = pico_bert(head="sequence-classification", num_hidden_layers=1)
    engine = exported(model, tmp_path / "out", make_work(), group=None, activation="dynamic")
    kinds = [n.op_type for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert kinds.count("MatMulInteger") == 8  # six in the block, pooler, classifier
    name = "bert.encoder.layer.0.intermediate.dense"
    weight = model.module.get_submodule(name).int8_weight().numpy()
    stored = initializers(tmp_path / "out").values()
    assert any(a.dtype == np.int8 and np.array_equal(a, weight) for a in stored)
    batch = random_batch(2, 6)
    errors = largest_difference(
        outputs(model, batch), engine.outputs(batch), batch["attention_mask"]
    )
    assert errors["logits"] < INTEGER


def padded_equal(model, engine, tolerance):
    """Prefill and one-token steps of a left-padded batch against full forwards without padding."""
    rows = [torch.randint(5, 96, (n,)) for n in (6, 9)]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, 9 - len(tokens) :] = tokens
        mask[row, 9 - len(tokens) :] = 1
    logits, cache = engine.prefill({"input_ids": ids[:, :6], "attention_mask": mask[:, :6]})
    steps = [logits]
    for i in range(6, 9):
        logits, cache = engine.decode(ids[:, i : i + 1], cache)
        assert logits.shape == (2, 1, 96)
        steps.append(logits)
    found = torch.cat(steps, dim=1)
    for row, tokens in enumerate(rows):
        alone = {"input_ids": tokens[None], "attention_mask": torch.ones(1, len(tokens)).long()}
        wanted = outputs(model, alone)["logits"][0]
        difference = found[row, 9 - len(tokens) :] - wanted
        assert float(difference.norm() / wanted.norm()) < tolerance


def test_float_decoder_with_cache(pico_llama, tmp_path):
    model = pico_llama(num_hidden_layers=2, tie_word_embeddings=True, vocab_size=96)
    engine = exported(model, tmp_path / "out")
    padded_equal(model, engine, FLOAT)
    for batch in (random_batch(1, 1), random_batch(3, 12)):
        wanted = outputs(model, batch)
        errors = largest_difference(wanted, engine.outputs(batch), batch["attention_mask"])
        assert errors["logits"] < FLOAT
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    past = {
        f"past_key_values.{i}.{s}": ["batch", 2, "past", 8]
        for i in (0, 1)
        for s in ("key", "value")
    }
    tokens = ["batch", "sequence"]
    given = {"input_ids": tokens, "attention_mask": ["batch", "total"], "position_ids": tokens}
    assert names(graph.input) == given | past
    sides = [f"present.{i}.{s}" for i in (0, 1) for s in ("key", "value")]
    assert list(names(graph.output)) == ["logits", *sides]


@pytest.mark.parametrize("quantization", [{}, {"bits": 4, "group": 32}])
def test_a_tied_table_is_stored_once(pico_llama, make_work, tmp_path, quantization):
    model = pico_llama(
        tie_word_embeddings=True, vocab_size=20_000, num_hidden_layers=1, intermediate_size=64
    )
    exported(model, tmp_path / "out", make_work(), **quantization)
    size = (tmp_path / "out" / "model.onnx").stat().st_size
    per_row = 32 // 2 + 4 if quantization else 32 * 4
    assert 20_000 * per_row < size < 20_000 * per_row * 1.15 + 150_000
    if quantization:
        assert model.module.lm_head.codes_OI is model.module.model.embed_tokens.codes_OI


def test_one_scale_per_channel_of_an_odd_width(pico_llama, make_work, tmp_path):
    """40 inputs end inside a block of 16: the file pads them, the numbers stay."""
    model = pico_llama(num_hidden_layers=1, intermediate_size=40, hidden_size=32)
    engine = exported(model, tmp_path / "out", make_work(), bits=8, group=None)
    padded_equal(model, engine, INTEGER)
    batch = random_batch(2, 5)
    given = {k: v.numpy() for k, v in batch.items()}
    given["position_ids"] = np.arange(5)[None].repeat(2, axis=0)
    for side in ("key", "value"):
        given[f"past_key_values.0.{side}"] = np.zeros((2, 2, 0, 8), np.float32)
    got = exact_session(tmp_path / "out").run(["logits"], given)[0]
    wanted = outputs(model, batch)["logits"].numpy()
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < FLOAT


def test_masked_language_model_gives_logits(pico_bert, make_work, tmp_path):
    model = pico_bert(head="masked-lm", num_hidden_layers=1)
    engine = exported(model, tmp_path / "out", make_work(), bits=8, group=32)
    assert engine.outputs(random_batch(2, 5))["logits"].shape == (2, 5, 96)
    with pytest.raises(CompressError, match="no decoder"):
        engine.prefill(random_batch(1, 3))


def test_groups_without_a_block_are_refused(pico_llama, make_work):
    model = pico_llama()
    rtn.run(model, rtn.Options(group=8), make_work())
    with pytest.raises(CompressError, match="groups of 8 inputs, as 'model") as error:
        make_twin(model)
    assert "export.safetensors" in error.value.hint


def test_large_models_use_external_data(pico_bert, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_LARGEST_FILE", 10_000)
    model = pico_bert(num_hidden_layers=1)
    engine = exported(model, tmp_path / "out")
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "out").iterdir()}
    data = tmp_path / "out" / "model.onnx.data"
    assert sizes["model.onnx.data"] > sizes["model.onnx"] / 2
    assert engine.outputs(random_batch(1, 4))["last_hidden_state"].shape == (1, 4, 32)
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(CompressError, match=r"keeps weights in model\.onnx\.data"):
        OnnxRuntimeEngine(tmp_path / "out")
    data.unlink()
    with pytest.raises(CompressError, match=r"keeps weights in model\.onnx\.data"):
        OnnxRuntimeEngine(tmp_path / "out")
