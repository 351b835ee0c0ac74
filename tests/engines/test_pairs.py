"""Encoder-decoders in the torch engine: the cache, padding and greedy text."""

import pytest
import torch

from compressor.engines.generate import generate
from compressor.engines.torch import TorchEngine
from compressor.errors import CompressError
from families import pico, random_inputs

PAIRS = ("t5", "whisper")


@pytest.mark.parametrize("name", PAIRS)
def test_steps_are_the_full_forward(name, tmp_path):
    model = pico(name)
    engine = TorchEngine.of(model, tmp_path)
    batch = random_inputs(model)
    batch["decoder_attention_mask"].fill_(1)
    batch["decoder_attention_mask"][0, :2] = 0  # in front, as for generation
    wanted = engine.outputs(batch)["logits"]
    names = ("decoder_input_ids", "decoder_attention_mask")
    logits, cache = engine.prefill(batch | {key: batch[key][:, :6] for key in names})
    steps = [logits]
    for i in range(6, 11):
        logits, cache = engine.decode(batch["decoder_input_ids"][:, i : i + 1], cache)
        steps.append(logits)
    real = batch["decoder_attention_mask"].bool()
    torch.testing.assert_close(torch.cat(steps, dim=1)[real], wanted[real], atol=1e-5, rtol=1e-4)
    alone = {key: v[:1, 2:] if key in names else v[:1] for key, v in batch.items()}
    torch.testing.assert_close(
        engine.outputs(alone)["logits"][0], wanted[0, 2:], atol=1e-5, rtol=1e-4
    )


def test_greedy_text_is_that_of_transformers(tmp_path):
    model = pico("t5")
    engine = TorchEngine.of(model, tmp_path)
    model.config.save_pretrained(tmp_path)
    source = {k: v[1:2] for k, v in random_inputs(model).items() if "decoder" not in k}
    wanted = model.module.generate(**source, max_new_tokens=12, num_beams=1, do_sample=False)
    assert generate(engine, [], 12, model.config.eos_token_id, source) == wanted[0].tolist()


def test_without_a_head_there_is_no_text(tmp_path):
    model = pico("t5", head=False)
    with pytest.raises(CompressError, match="cannot generate"):
        TorchEngine.of(model, tmp_path).prefill(random_inputs(model))


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3_text"])
def test_a_row_padded_in_front_gives_what_it_gives_alone(name, tmp_path):
    model = pico(name)
    engine = TorchEngine.of(model, tmp_path)
    batch = random_inputs(model, rows=2, length=20)
    alone = {key: value[1:, 3:] for key, value in batch.items()}
    wanted = engine.outputs(alone)["logits"]
    torch.testing.assert_close(
        engine.outputs(batch)["logits"][1:, 3:], wanted, atol=1e-4, rtol=1e-4
    )
    logits, cache = engine.prefill({key: value[:, :9] for key, value in batch.items()})
    steps = [logits]
    for i in range(9, 20):
        logits, cache = engine.decode(batch["input_ids"][:, i : i + 1], cache)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1)[1:, 3:], wanted, atol=1e-4, rtol=1e-4)
