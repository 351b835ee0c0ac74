"""What the gate measures: differences by their formulas, the cache, ties and wrong tokens."""

import numpy as np
import pytest
import torch

from compressor.engines.torch import TorchEngine
from compressor.export.files import write_probe_of
from compressor.model.probe import read_continuation, read_probe
from compressor.run.agreement import Comparison, compare
from compressor.run.gate import EXACT, Agreement, check_agreement
from families import pico


class Noisy(TorchEngine):
    """An engine whose every logit is off by a number that is the same each time."""

    off = 0.0

    def _noise(self, logits):
        draw = torch.Generator().manual_seed(5)
        return logits + self.off * torch.randn(logits.shape, generator=draw)

    def outputs(self, batch):
        return {"logits": self._noise(super().outputs(batch)["logits"])}


class Forgetful(TorchEngine):
    """An engine that loses the cache behind the prompt."""

    def decode(self, token, cache):
        return self.prefill({"input_ids": token})[0], cache


@pytest.fixture(params=["llama", "gpt2", "t5", "whisper"])
def model(request, tmp_path):
    found = pico(request.param)
    write_probe_of(found, tmp_path)
    return found


def test_the_same_model_writes_the_same_text(model, tmp_path):
    found = check_agreement(TorchEngine.of(model, tmp_path), [], tmp_path)
    assert found.ok and found.errors.keys() == {"logits", "continuation"}
    stated = found.metrics()["differences"]["served"]
    assert stated["top1_agreement"] == 1 and stated["greedy"] == {"tokens": 16, "equal": 16}
    # the text is that of whole forwards, which know no cache
    inputs, tokens = read_probe(tmp_path)[0][0], read_continuation(tmp_path).argmax(dim=-1)
    prefix = "decoder_" if "decoder_input_ids" in inputs else ""
    ids = torch.cat([inputs[f"{prefix}input_ids"], tokens], dim=1)
    whole = {f"{prefix}input_ids": ids, f"{prefix}attention_mask": torch.ones_like(ids)}
    logits = TorchEngine.of(model, tmp_path).outputs(inputs | whole)["logits"]
    assert torch.equal(logits[:, -17:-1].argmax(dim=-1), tokens)


def test_differences_are_those_of_the_formulas(tmp_path):
    model = pico("llama")
    write_probe_of(model, tmp_path)
    engine = Noisy.of(model, tmp_path)
    engine.off = 0.5
    found = compare(engine, tmp_path, EXACT)
    pairs = [
        (wanted["logits"][mask].double().numpy(), engine.outputs(inputs)["logits"][mask].numpy())
        for inputs, wanted in read_probe(tmp_path)
        if (mask := inputs["attention_mask"].bool()) is not None
    ]
    off = np.concatenate([np.abs(got - wanted).ravel() for wanted, got in pairs])
    stated = found.differences()
    assert stated["logits"]["max"] == pytest.approx(off.max(), rel=1e-5)
    assert stated["logits"]["mean"] == pytest.approx(off.mean(), rel=1e-5)
    same = [wanted.argmax(-1) == got.argmax(-1) for wanted, got in pairs]
    same.append(np.ones(16, dtype=bool))  # of the continuation, which has no noise
    assert stated["top1_agreement"] == pytest.approx(np.concatenate(same).mean())
    assert 0 < stated["top1_agreement"] < 1
    worst = max(np.linalg.norm(got - w) / np.linalg.norm(w) for w, got in pairs)
    assert found.errors["logits"] == pytest.approx(worst, rel=1e-5)


def test_a_lost_cache_is_found(tmp_path):
    model = pico("llama")
    write_probe_of(model, tmp_path)
    found = check_agreement(Forgetful.of(model, tmp_path), [], tmp_path)
    assert found.errors["logits"] < EXACT < found.errors["continuation"]
    assert "continuation" in found.failure and found.served.greedy.wrong


def judged(gap):
    """A text of two tokens of which an engine chooses the second otherwise."""
    from compressor.run.agreement import _greedy

    wanted = torch.tensor([[0.0, 4.0, 1.0], [4.0, 4.0 - gap, 0.0]])
    got = wanted.clone()
    got[1, 1] = 4.5
    served = Comparison({"continuation": 0.0}, greedy=_greedy(wanted, got, EXACT))
    return Agreement(served, EXACT, None), served.greedy


def test_a_tie_is_no_fault_and_another_token_is():
    tie, greedy = judged(1e-4)
    assert tie.ok and (greedy.tokens, greedy.equal) == (2, 1)
    other, greedy = judged(1e-2)
    assert not other.ok and "token 2 of 2 is 1 instead of 0" in other.failure
    assert Agreement(other.served, 0.1, None).ok  # rounded activations may write another text


def test_an_encoder_has_no_text(pico_bert, tmp_path):
    model = pico_bert()
    write_probe_of(model, tmp_path)
    assert read_continuation(tmp_path) is None
    found = check_agreement(TorchEngine.of(model, tmp_path), [], tmp_path)
    assert found.ok and found.metrics()["differences"]["served"].keys() == {"last_hidden_state"}
