"""Size, memory and latency of pico models."""

import dataclasses
import time

import pytest
import torch

from compressor.engines import open_engine
from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError
from compressor.measure import latency, memory, size
from compressor.measure.inputs import token_rows
from compressor.measure.process import died
from compressor.model.manifest import Manifest, WeightFormat, write_manifest


def saved(model, path):
    model.module.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_size_counts_what_is_deployed_and_a_tie_once(tied, pico_llama, make_work, tmp_path):
    model = pico_llama(tie_word_embeddings=tied)
    path = saved(model, tmp_path / "a")
    (path / "README.md").write_text("a card is not deployed")
    (path / "heldout.txt").write_text("nor is data")
    found = size.run(TorchEngine.of(model, path), size.Options(), make_work())
    weights = (path / "model.safetensors").stat().st_size
    files = [f for f in path.iterdir() if f.name not in ("README.md", "heldout.txt")]
    assert found["parameters"] == sum(p.numel() for p in model.module.parameters())
    assert found["weights_bytes"] == weights
    assert found["bytes"] == sum(f.stat().st_size for f in files)


def test_quantized_codes_count_as_the_manifest_says(pico_llama, make_work, tmp_path):
    path = saved(pico_llama(), tmp_path / "a")
    formats = {"lm_head": WeightFormat(bits=4)}
    engine = TorchEngine.of(pico_llama(), path)
    write_manifest(path, Manifest("checkpoint", "llama", {}, formats=formats))
    with pytest.raises(CompressError, match="does not say how many parameters"):
        size.run(engine, size.Options(), make_work())
    known = Manifest("checkpoint", "llama", {}, formats=formats, metrics={"parameters": 123})
    write_manifest(path, known)
    assert size.run(engine, size.Options(), make_work())["parameters"] == 123


def test_memory_is_that_of_a_process_of_its_own(pico_llama, make_work, tmp_path):
    engine = TorchEngine.of(pico_llama(), saved(pico_llama(), tmp_path / "a"))
    ballast = torch.ones(150_000_000)  # 600 MB of this process are none of the candidate's
    found = memory.run(engine, memory.Options(), make_work())
    assert ballast.numel() and 100e6 < found["baseline_bytes"] < found["peak_memory_bytes"]
    assert found["peak_memory_bytes"] < 550e6
    broken = tmp_path / "b"
    saved(pico_llama(), broken)
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(CompressError, match="measuring 'b' died: "):
        memory.run(TorchEngine.of(pico_llama(), broken), memory.Options(), make_work())


class Slow:
    """An engine whose calls take known times."""

    name = "torch"

    def __init__(self, path, per_row=0.0, step=0.0):
        self.path, self.per_row, self.step, self.shapes = path, per_row, step, []

    def outputs(self, batch):
        self.shapes.append(tuple(batch["input_ids"].shape))
        time.sleep(self.per_row * len(batch["input_ids"]))
        return {}

    def prefill(self, batch):
        time.sleep(5 * self.step)
        return torch.zeros(1, batch["input_ids"].shape[1], 4), 0

    def decode(self, token, cache):
        time.sleep(self.step)
        return torch.zeros(1, 1, 4), cache + 1

    def close(self):
        pass


def test_latency_of_an_encoder_is_one_row_and_throughput_many(pico_bert, make_work, tmp_path):
    engine = Slow(saved(pico_bert(), tmp_path / "a"), per_row=0.01)
    options = latency.Options(batches=(4, 2), length=16, seconds=0.1)
    found = latency.run(engine, options, make_work())
    assert set(engine.shapes) == {(1, 16), (2, 16), (4, 16)}
    assert 10 <= found["p50"] <= found["p95"] < 20 and found["length"] == 16
    assert 20 <= found["batch_2"] < 30 and 40 <= found["batch_4"] < 60
    assert 60 < found["throughput"] <= 100  # rows per second
    assert found["throughput"] == found["batch_4_throughput"]
    only = latency.run(engine, dataclasses.replace(options, batches=()), make_work())
    assert only.keys() == {"p50", "p95", "iqr", "length"}


def test_latency_of_a_decoder_is_one_step(pico_llama, make_work, tmp_path):
    engine = Slow(saved(pico_llama(), tmp_path / "a"), step=0.005)
    options = latency.Options(tokens=8, seconds=0.1, prompts=(16, 512, 400))
    found = latency.run(engine, options, make_work())
    assert 5 <= found["p50"] < 10
    assert 100 < found["throughput"] <= 200  # tokens per second
    assert found["length"] == 120  # prompt and steps fit the 128 positions
    prompts = {key: ms for key, ms in found.items() if key.startswith("prefill_")}
    assert prompts.keys() == {"prefill_16", "prefill_128"}  # as far as there are positions
    assert all(25 <= ms < 40 for ms in prompts.values())


def test_a_real_engine_is_timed_without_padding(pico_bert, make_work, tmp_path):
    engine = open_engine(saved(pico_bert(), tmp_path / "a"))
    found = latency.run(engine, latency.Options(batches=(2,), seconds=0.02), make_work())
    assert found["length"] == 64 and 0 < found["p50"] <= found["p95"]
    rows = token_rows(make_work().batches("heldout", 2), 3, 50)
    assert rows["input_ids"].shape == (3, 50) and bool((rows["input_ids"] > 0).all())
    assert bool(rows["attention_mask"].all())


def test_how_a_process_died_is_said_in_words():
    assert "memory ran out" in died("a", -9, "").what
    assert "signal SIGSEGV" in died("a", -11, "").what
    memory = died("a", 1, "Traceback\nMemoryError\n")
    assert isinstance(memory, CompressError) and "free memory" in memory.hint
    allocator = died("a", 1, "RuntimeError: DefaultCPUAllocator: can't allocate memory: 9 bytes")
    assert isinstance(allocator, CompressError)
    refused = died("a", 1, "Traceback\ncompressor.errors.CompressError: it is truncated\n")
    assert isinstance(refused, CompressError) and str(refused).endswith("died: it is truncated")


def test_a_crash_of_a_process_is_not_taken_for_the_users_mistake():
    crash = died("a", 1, "Traceback\nValueError: x\n")
    assert not isinstance(crash, CompressError) and str(crash).endswith("died: ValueError: x")
    assert str(died("a", 7, "")).endswith("died: exit code 7")
