"""The engine llama.cpp against PyTorch: every family, cache, tokenizer, and what it refuses."""

import pytest
import torch
from safetensors.torch import save_file

import compressor
from compressor.engines.generate import generate
from compressor.engines.gguf import FILE, open_file, tensors_of, value
from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError, Refused
from compressor.export import gguf as export
from compressor.export import gguf_names
from compressor.export.gguf_table import ARCHS
from compressor.measure import footprint
from compressor.model.checkpoint import load_directory
from compressor.model.model import Pooling
from compressor.model.probe import largest_difference, read_probe
from compressor.quantize import rtn
from compressor.run import llama_text, verify
from compressor.run.gate import LLAMA, ROUNDED, check_agreement
from families import VOCABULARY, pico

pytest.importorskip("gguf", reason="pip install 'compress[gguf]'")
pytest.importorskip("llama_cpp", reason="pip install 'compress[llama-cpp]' (it is compiled)")

from compressor.engines.llama_cpp import LlamaCppEngine

# measured: a cache of float16 moves outputs of these models by 1.2e-3 at most, weights of float16
# by 1.6e-3; activations in bfloat16 by 1.0e-2
CLOSE = {"auto": 2e-3, "f16": 3e-3, "bf16": 2e-2}


def exported(model, out, **options):
    artifact = export.run(model, export.Options(**options), out)
    assert artifact.engine == "llama.cpp"
    return artifact


@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize("kind", CLOSE)
def test_outputs_are_those_of_torch(name, kind, tmp_path):
    settings = {"sliding_window": None} if name == "mistral" else {}
    artifact = exported(pico(name, head=name != "bert", **settings), tmp_path, type=kind)
    engine = LlamaCppEngine(tmp_path, threads=1)
    found = check_agreement(engine, artifact.manifest.formats.values(), tmp_path)
    assert found.ok and found.served_tolerance == LLAMA
    assert max(found.served.errors.values()) < CLOSE[kind] and max(found.exact.errors.values()) == 0
    engine.close()


def test_rows_that_nobody_permuted_are_noticed(tmp_path, monkeypatch):
    """Writer and reader agree with each other then: only llama.cpp can tell."""
    monkeypatch.setattr(gguf_names, "_order", lambda *_: None)
    artifact = exported(pico("llama"), tmp_path)
    found = check_agreement(LlamaCppEngine(tmp_path), artifact.manifest.formats.values(), tmp_path)
    assert max(found.exact.errors.values()) == 0
    assert not found.ok and max(found.served.errors.values()) > 0.3


@pytest.mark.parametrize("kind", ["llama3", "linear"])
def test_slowed_rotations(kind, tmp_path):
    """Positions far out, where a wrong frequency turns everything."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 32}
    model = pico("llama", rope_parameters=rope)
    exported(model, tmp_path)
    batch = {"input_ids": torch.randint(5, VOCABULARY, (1, 100))}
    wanted = TorchEngine.of(model, tmp_path).outputs(batch)
    plain = TorchEngine.of(pico("llama"), tmp_path).outputs(batch)
    found = LlamaCppEngine(tmp_path, threads=1).outputs(batch)
    assert largest_difference(wanted, found, None)["logits"] < 3e-3
    assert largest_difference(wanted, plain, None)["logits"] > 3e-2


def test_windows_and_the_cache_beyond_them(tmp_path):
    model = pico("gemma3_text")  # a window of 8 tokens in two of three layers
    exported(model, tmp_path)
    batch = {"input_ids": torch.randint(5, VOCABULARY, (1, 40))}
    wanted = TorchEngine.of(model, tmp_path).outputs(batch)
    found = LlamaCppEngine(tmp_path, threads=1).outputs(batch)
    assert largest_difference(wanted, found, None)["logits"] < 3e-3


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_0")])
def test_codes_serve(bits, kind, make_work, tmp_path):
    model = pico("llama", intermediate_size=64, tie_word_embeddings=True)
    rtn.run(model, rtn.Options(bits=bits, group=32), make_work())
    artifact = exported(model, tmp_path)
    found = check_agreement(LlamaCppEngine(tmp_path), artifact.manifest.formats.values(), tmp_path)
    assert found.ok and found.served_tolerance == ROUNDED
    assert 1e-4 < max(found.served.errors.values()) < 4e-2


def test_k_quants_are_those_of_llama_cpp(tmp_path):
    """Made by its own code; read by the library; no further off than four bits are."""
    model = pico("llama", hidden_size=256, head_dim=64, initializer_range=0.05)
    own = model.module.model.layers[0].mlp.up_proj.weight
    artifact = exported(model, tmp_path, requantize="q4_k")
    stored = tensors_of(open_file(tmp_path / FILE))
    assert stored["blk.0.ffn_up.weight"].tensor_type.name == "Q4_K"
    assert stored["blk.0.ffn_down.weight"].tensor_type.name == "F32"  # 48 inputs
    error = (value(stored["blk.0.ffn_up.weight"]) - own).norm() / own.norm()
    assert 0.02 < error < 0.1
    assert artifact.manifest.formats["model.layers.0.mlp.up_proj"].scale_dtype != "float16"
    found = check_agreement(LlamaCppEngine(tmp_path), artifact.manifest.formats.values(), tmp_path)
    assert found.ok and found.served_tolerance == ROUNDED


def test_a_prompt_and_steps_give_what_a_full_forward_gives(tmp_path):
    exported(pico("llama"), tmp_path)
    engine = LlamaCppEngine(tmp_path, threads=1)
    inputs = read_probe(tmp_path)[2][0]  # rows of 11, 10 and 9 tokens, padded in front
    whole = engine.outputs(inputs)["logits"]
    start = {key: value[:, :6] for key, value in inputs.items()}
    logits, cache = engine.prefill(start)
    real = start["attention_mask"].bool()
    assert torch.allclose(logits[real], whole[:, :6][real], atol=2e-2)
    for place in range(6, 11):
        logits, cache = engine.decode(inputs["input_ids"][:, place : place + 1], cache)
        assert logits.shape == (3, 1, VOCABULARY)
        assert torch.allclose(logits[:, 0], whole[:, place], atol=2e-2)


def test_two_caches_take_turns_and_outgrow_their_room(tmp_path, monkeypatch):
    monkeypatch.setattr("compressor.engines.llama_session._ROOM", 2)
    exported(pico("llama"), tmp_path)
    engine = LlamaCppEngine(tmp_path, threads=1)
    alone = [generate(engine, [5, 6 + i], 12) for i in range(2)]
    states = [engine.prefill({"input_ids": torch.tensor([[5, 6 + i]])}) for i in range(2)]
    texts = [[5, 6], [5, 7]]
    for _ in range(12):
        for i, (logits, cache) in enumerate(states):
            texts[i].append(int(logits[0, -1].argmax()))
            states[i] = engine.decode(torch.tensor([texts[i][-1:]]), cache)
    assert texts == alone


def test_sentence_embeddings(tmp_path):
    model = pico("bert", head=False)
    model.pooling = Pooling("mean", True)
    exported(model, tmp_path)
    engine = compressor.engines.open_engine_of("llama.cpp", tmp_path, 1)
    inputs, wanted = read_probe(tmp_path)[1]
    found = engine.outputs(inputs)
    assert largest_difference(wanted, found, inputs["attention_mask"])["sentence_embedding"] < 2e-3
    with pytest.raises(CompressError, match="cannot generate"):
        engine.prefill(inputs)


@pytest.mark.parametrize("name", ["stories260K", "novels-llama"])
def test_real_checkpoints_tokenizer_and_words(shared_data, tmp_path, name):
    """SentencePiece-like BPE with bytes, and byte-level BPE."""
    model = load_directory(shared_data / "checkpoints" / name)
    exported(model, tmp_path)
    engine = LlamaCppEngine(tmp_path, threads=1)
    text = (shared_data / "data" / "tinystories.txt").read_text(encoding="utf-8")[:20_000]
    for piece in [*text.split("\n\n"), *llama_text.TEXTS, " ", "a  b"]:
        if piece:
            assert (
                engine.session.tokenize(piece, special=True) == model.processor(piece)["input_ids"]
            )
    found = llama_text.compare_text(engine, tmp_path)
    assert found["tokenized"] == 3


def test_an_artefact_of_a_real_checkpoint(shared_data, tmp_path, monkeypatch):
    """Exported, verified, loaded by the lines of its card, measured in a process of its own."""
    out = tmp_path / "out"
    source = shared_data / "checkpoints" / "stories260K"
    artifact = compressor.export_checkpoint(str(source), "gguf", out, ["requantize=q8_0"])
    served = artifact.manifest.metrics["differences"]["served"]
    assert served["greedy"]["tokens"] == 16 and artifact.engine == "llama.cpp"
    card = (out / "README.md").read_text()
    assert "rounded to q8_0 by this export" in card and "same tokens as the tokenizer" in card
    code = (
        card.partition("```python\n")[2]
        .partition("```")[0]
        .replace("max_tokens=60", "max_tokens=3")
    )
    assert len(code.strip().splitlines()) == 3
    exec(code.replace("DIR", repr(str(out))), {"__name__": "card"})
    save_file(
        {"input_ids": torch.ones(1, 9).long(), "attention_mask": torch.ones(1, 9).long()},
        tmp_path / "rows.safetensors",
    )
    job = {"engine": "llama.cpp", "path": str(out), "inputs": str(tmp_path / "rows.safetensors")}
    found = footprint.main(job | {"threads": 1, "prefill": True})
    assert found["peak_memory_bytes"] >= found["baseline_bytes"] > 0
    checks = {c["name"]: c for c in compressor.verify(out)["checks"]}
    assert all(c["ok"] for c in checks.values()) and "in llama.cpp" in checks["probe"]["detail"]
    monkeypatch.setattr(verify, "installed", lambda name: False)
    checks = {c["name"]: c for c in compressor.verify(out)["checks"]}
    assert all(c["ok"] for c in checks.values()) and "read back only" in checks["probe"]["detail"]


def test_a_tokenizer_that_cuts_otherwise_is_refused(shared_data, tmp_path, monkeypatch):
    model = load_directory(shared_data / "checkpoints" / "novels-llama")
    real = export.vocabulary

    def other(processor, size):
        found = real(processor, size)
        merges = found["tokenizer.ggml.merges"]
        return found | {"tokenizer.ggml.merges": merges[:3] + merges[100:]}

    monkeypatch.setattr(export, "vocabulary", other)
    exported(model, tmp_path)
    with pytest.raises(Refused, match="into other tokens"):
        llama_text.compare_text(LlamaCppEngine(tmp_path, threads=1), tmp_path)


def test_a_damaged_file(tmp_path):
    exported(pico("llama"), tmp_path)
    file = tmp_path / "model.gguf"
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(CompressError, match=r"llama\.cpp cannot load"):
        LlamaCppEngine(tmp_path)
