"""The torch engine: cache and full forward agree, padding on the left changes nothing."""

import pytest
import torch

from compressor.engines import open_engine, open_engine_of
from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError
from compressor.model.manifest import Manifest, write_manifest


def saved(model, path):
    model.module.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


@pytest.fixture
def engine(pico_llama, tmp_path):
    return TorchEngine.of(pico_llama(), tmp_path)


def prompt(rows, length):
    ids = torch.randint(5, 96, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_prefill_and_decode_give_the_logits_of_one_full_forward(engine):
    batch = prompt(2, 12)
    wanted = engine.outputs(batch)["logits"]
    got, cache = engine.prefill({k: v[:, :7] for k, v in batch.items()})
    steps = [got]
    for i in range(7, 12):
        logits, cache = engine.decode(batch["input_ids"][:, i : i + 1], cache)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted, atol=1e-5, rtol=1e-4)


def test_a_left_padded_row_generates_what_it_generates_alone(engine):
    batch = prompt(2, 9)
    batch["input_ids"][1, :3], batch["attention_mask"][1, :3] = 0, 0
    alone = {k: v[1:, 3:] for k, v in batch.items()}
    together, cache = engine.prefill(batch)
    single, single_cache = engine.prefill(alone)
    torch.testing.assert_close(together[1:, 3:], single, atol=1e-5, rtol=1e-4)
    for token in (7, 50, 23):
        together, cache = engine.decode(torch.tensor([[9], [token]]), cache)
        single, single_cache = engine.decode(torch.tensor([[token]]), single_cache)
        torch.testing.assert_close(together[1:], single, atol=1e-5, rtol=1e-4)


def test_an_encoder_refuses_to_generate(pico_bert, tmp_path):
    engine = TorchEngine.of(pico_bert(), tmp_path)
    assert engine.outputs(prompt(1, 5) | {"row": torch.zeros(1)})["last_hidden_state"].dim() == 3
    with pytest.raises(CompressError, match="cannot generate"):
        engine.prefill(prompt(1, 5))


def test_a_plain_hugging_face_directory_opens_in_torch(pico_bert, tmp_path):
    model = pico_bert()
    engine = open_engine(saved(model, tmp_path / "plain"), threads=1)
    assert engine.name == "torch" and torch.get_num_threads() == 1
    batch = prompt(2, 6)
    wanted = TorchEngine.of(model, tmp_path).outputs(batch)
    assert torch.equal(engine.outputs(batch)["last_hidden_state"], wanted["last_hidden_state"])
    engine.close()


def test_what_cannot_be_opened_says_why(pico_llama, tmp_path):
    with pytest.raises(CompressError, match="no directory"):
        open_engine(tmp_path / "absent")
    with pytest.raises(CompressError, match="no checkpoint"):
        open_engine(tmp_path)
    path = saved(pico_llama(), tmp_path / "foreign")
    write_manifest(path, Manifest("artifact", "llama", {}, engine="tensorrt"))
    with pytest.raises(CompressError, match="asks for the engine 'tensorrt'"):
        open_engine(path)
    assert open_engine_of("torch", path).name == "torch"
