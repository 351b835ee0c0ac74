"""What families add to an export: sliding windows, a second stack, images. Pico models."""

import json
from dataclasses import replace

import onnx
import pytest
import torch
import transformers

from compressor.engines.generate import generate
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError
from compressor.export import onnx as export
from compressor.model.forward import output_mask, outputs
from compressor.model.manifest import read_manifest, write_manifest
from compressor.model.probe import largest_difference
from compressor.quantize import rtn
from compressor.run.card_usage import usage
from compressor.run.gate import check_agreement
from conftest import character_tokenizer
from families import pico, random_inputs

FLOAT = 1e-5


def exported(model, out):
    """Export with a manifest, so that the directory opens as a user would open it."""
    out.mkdir(exist_ok=True)
    artifact = export.run(model, export.Options(), out)
    write_manifest(out, replace(artifact.manifest, metrics={"agreement": {"logits": 0.0}}))
    return OnnxRuntimeEngine(out, threads=1)


def error(model, engine, batch):
    found = largest_difference(outputs(model, batch), engine.outputs(batch), output_mask(batch))
    return max(found.values())


def decoded(engine, batch, prompt, ids="input_ids", mask="attention_mask"):
    """Logits of a prompt and of one-token steps after it, joined."""
    start = batch | {key: batch[key][:, :prompt] for key in (ids, mask)}
    logits, cache = engine.prefill(start)
    steps = [logits]
    for i in range(prompt, batch[ids].shape[1]):
        logits, cache = engine.decode(batch[ids][:, i : i + 1], cache)
        steps.append(logits)
    return torch.cat(steps, dim=1)


def axes(values):
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }


def test_a_window_narrower_than_the_cache(make_work, tmp_path):
    """Gemma-2 in 8 bits: window, soft caps, a scaled table tied to the head, no pad token."""
    kinds = ["sliding_attention", "full_attention"]
    model = pico("gemma2", num_hidden_layers=2, layer_types=kinds, pad_token_id=None)
    assert model.config.sliding_window == 8 and model.config.tie_word_embeddings
    rtn.run(model, rtn.Options(bits=8, group=16), make_work())
    engine = exported(model, tmp_path / "out")
    assert check_agreement(engine, model.formats.values(), tmp_path / "out").ok
    exact = OnnxRuntimeEngine(tmp_path / "out", threads=1, exact=True)
    batch = random_inputs(model, rows=2, length=22)  # row 1 is padded in front
    found = decoded(exact, batch, prompt=10)
    for row, padding in enumerate((0, 3)):
        alone = {key: value[row : row + 1, padding:] for key, value in batch.items()}
        wanted = outputs(model, alone)["logits"][0]
        assert float((found[row, padding:] - wanted).norm() / wanted.norm()) < FLOAT


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    model = pico("t5", num_layers=1, processor=character_tokenizer())
    out = tmp_path_factory.mktemp("t5") / "out"
    return model, exported(model, out), out


def test_an_encoder_decoder_at_several_shapes(t5):
    model, engine, out = t5
    assert sorted(f.name for f in out.glob("*.onnx")) == [
        "decoder_model.onnx",
        "encoder_model.onnx",
    ]
    for rows, length in ((1, 1), (1, 7), (3, 11)):
        batch = random_inputs(model, rows=rows, length=length)
        batch |= {k: v.clamp(min=int(length == 1)) for k, v in batch.items() if "mask" in k}
        assert error(model, engine, batch) < FLOAT
    short = batch | {k: batch[k][:, :4] for k in ("decoder_input_ids", "decoder_attention_mask")}
    assert error(model, engine, short) < FLOAT  # source and answer need not be equally long


def test_steps_of_an_encoder_decoder_are_its_full_forward(t5):
    """Relative positions count from the past; the padded source is as if it were cut."""
    model, engine, _ = t5
    batch = random_inputs(model, rows=2, length=24)
    batch["decoder_attention_mask"].fill_(1)
    names = ("decoder_input_ids", "decoder_attention_mask")
    found = decoded(engine, batch, 5, *names)
    torch.testing.assert_close(found, outputs(model, batch)["logits"], atol=1e-4, rtol=1e-4)
    cut = {key: v[1:] if key in names else v[1:, :-3] for key, v in batch.items()}
    torch.testing.assert_close(found[1:], outputs(model, cut)["logits"], atol=1e-4, rtol=1e-4)


def test_the_graphs_of_an_encoder_decoder(t5):
    _, _, out = t5
    encoder = onnx.load(out / "encoder_model.onnx").graph
    decoder = onnx.load(out / "decoder_model.onnx").graph
    sides = [f"{i}.{side}" for i in range(2) for side in ("key", "value")]
    source = ["batch", "source"]
    assert axes(encoder.input) == {"input_ids": source, "attention_mask": source}
    assert list(axes(encoder.output)) == ["last_hidden_state", *(f"cross.{s}" for s in sides)]
    tokens = {
        "decoder_input_ids": ["batch", "sequence"],
        "decoder_attention_mask": ["batch", "total"],
        "attention_mask": source,
    }
    cross = {f"cross.{s}": ["batch", 4, "source", 8] for s in sides}
    past = {f"past_key_values.{s}": ["batch", 4, "past", 8] for s in sides}
    assert axes(decoder.input) == tokens | cross | past
    assert list(axes(decoder.output)) == ["logits", *(f"present.{s}" for s in sides)]
    assert not any("EncDecAttention.k" in t.name for t in decoder.initializer)


def test_greedy_text_of_an_encoder_decoder(t5):
    model, engine, out = t5
    source = {k: v[1:2] for k, v in random_inputs(model).items() if "decoder" not in k}
    wanted = [model.config.decoder_start_token_id]
    for _ in range(12):  # everything anew at each token, no cache
        logits = outputs(model, source | {"decoder_input_ids": torch.tensor([wanted])})["logits"]
        wanted.append(int(logits[0, -1].argmax()))
    assert generate(engine, [], 12, source=source) == wanted
    assert generate(TorchEngine.of(model, out), [0], 12, source=source) == wanted


def test_the_card_of_an_encoder_decoder_runs(t5, capsys):
    model, _, out = t5
    exec(usage(read_manifest(out), model.task), {"DIR": str(out)})
    assert capsys.readouterr().out


def test_without_a_head_there_is_nothing_to_export(tmp_path):
    with pytest.raises(CompressError, match="t5 has no head") as refused:
        export.run(pico("t5", head=False), export.Options(), tmp_path)
    assert "ForConditionalGeneration" in refused.value.hint
    assert not list(tmp_path.glob("*.onnx"))


def test_a_table_shared_by_both_stacks_and_the_head(make_work, tmp_path):
    model = pico("t5", num_layers=1, num_decoder_layers=1)
    rtn.run(model, rtn.Options(bits=4, group=16), make_work())
    table = model.module.shared.codes_OI
    assert model.module.lm_head.codes_OI is table is model.module.encoder.embed_tokens.codes_OI
    engine = exported(model, tmp_path / "out")
    found = check_agreement(engine, model.formats.values(), tmp_path / "out")
    assert found.ok and found.exact is not None and found.exact.errors["logits"] < FLOAT
    nodes = onnx.load(tmp_path / "out" / "decoder_model.onnx").graph.node
    head = next(n for n in reversed(nodes) if n.op_type == "MatMulNBits")
    rows = next(n for n in nodes if n.op_type == "GatherBlockQuantized")
    assert head.input[1] == rows.input[0]


def test_whisper_and_its_card(tmp_path, capsys):
    """Sound in, positions learned: rows of an answer may be padded in front."""
    config = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "max_source_positions": 50,
        "max_target_positions": 80,
    }
    model = pico("whisper", processor=character_tokenizer(), **config)
    engine = exported(model, tmp_path / "out")
    batch = random_inputs(model, rows=2, length=12)
    assert error(model, engine, batch) < FLOAT
    batch["decoder_attention_mask"].fill_(1)
    batch["decoder_attention_mask"][1, :3] = 0
    names = ("decoder_input_ids", "decoder_attention_mask")
    found = decoded(engine, batch, 5, *names)[1:, 3:]
    alone = {key: v[1:, 3:] if key in names else v[1:] for key, v in batch.items()}
    torch.testing.assert_close(found, outputs(model, alone)["logits"], atol=1e-4, rtol=1e-4)
    hear = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    hear.save_pretrained(tmp_path / "out")
    exec(usage(read_manifest(tmp_path / "out"), model.task), {"DIR": str(tmp_path / "out")})
    assert capsys.readouterr().out


def test_images_and_their_card(make_work, tmp_path):
    model = pico("vit", num_hidden_layers=1)
    rtn.run(model, rtn.Options(bits=8, group=16), make_work())
    engine = exported(model, tmp_path / "out")
    assert check_agreement(engine, model.formats.values(), tmp_path / "out").ok
    for rows in (1, 4):
        batch = random_inputs(model, rows=rows)
        assert engine.outputs(batch)["logits"].shape == (rows, 5)
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert axes(graph.input) == {"pixel_values": ["batch", 3, 16, 16]}
    with pytest.raises(CompressError, match="no decoder"):
        engine.prefill(batch)
    read = {"image_processor_type": "ViTImageProcessorPil", "size": {"height": 16, "width": 16}}
    (tmp_path / "out" / "preprocessor_config.json").write_text(json.dumps(read))
    scope = {"DIR": str(tmp_path / "out")}
    exec(usage(read_manifest(tmp_path / "out"), model.task), scope)
    assert scope["found"].shape == (1, 5)
