"""Expected calibration error against the formula, position by position."""

import dataclasses

import pytest
import torch

from compressor.engines.torch import TorchEngine
from compressor.measure import fidelity
from compressor.measure.calibration import calibration_error, deviations
from families import pico, random_inputs


def by_hand(probabilities, answers):
    """Equation 3 of arXiv 1706.04599: bins ((b - 1) / 15, b / 15], weighted by what is in them."""
    total = 0.0
    for b in range(15):
        inside = [
            (max(p), p.index(max(p)) == answer)
            for p, answer in zip(probabilities, answers, strict=True)
            if b / 15 < max(p) <= (b + 1) / 15
        ]
        if inside:
            accuracy = sum(hit for _, hit in inside) / len(inside)
            confidence = sum(p for p, _ in inside) / len(inside)
            total += len(inside) / len(answers) * abs(accuracy - confidence)
    return total


def test_it_is_the_formula():
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 5, generator=draw)
    answers = torch.where(
        torch.rand(400, generator=draw) < 0.5,
        logits.argmax(-1),
        torch.randint(5, (400,), generator=draw),
    )
    rows = [deviations(x, y) for x, y in zip(logits.split(8), answers.split(8), strict=True)]
    found = calibration_error(torch.stack(rows), torch.full((50,), 8), torch.arange(50) // 2)
    wanted = by_hand(logits.double().softmax(-1).tolist(), answers.tolist())
    assert found.value == pytest.approx(wanted, abs=1e-12) and wanted > 0.02
    assert found.low < found.high and found.n == 25


def test_a_resample_is_the_error_of_its_documents():
    """Two documents: each resample is one of three errors, so the ends are known."""
    sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.1, 0.0]])
    wrong, right = deviations(sure, torch.tensor([1])), deviations(unsure, torch.tensor([0]))
    found = calibration_error(torch.stack([wrong, right]), torch.ones(2), torch.tensor([4, 7]))
    worst, best = sure.double().softmax(-1).max(), 1 - unsure.double().softmax(-1).max()
    assert found.value == pytest.approx(float(worst + best) / 2)
    assert (found.low, found.high) == pytest.approx((float(best), float(worst)))


def test_who_is_as_sure_as_right_is_calibrated():
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(8, 3)
    exact = deviations(logits, torch.tensor([0, 0, 0, 0, 1, 2, 1, 2]))
    assert float(exact.abs().sum()) == pytest.approx(0, abs=1e-6)
    never = deviations(logits, torch.ones(8, dtype=torch.long))
    assert float(never.abs().sum()) == pytest.approx(8 * 0.5)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_fidelity_gives_that_of_the_right_answers(name, make_work, tmp_path):
    model = pico(name, initializer_range=0.6) if name in ("llama", "bert") else pico(name)
    model.module.config.architectures = [type(model.module).__name__]
    model.module.config.save_pretrained(tmp_path)
    engine = TorchEngine.of(model, tmp_path)
    batches, probabilities, answers = [], [], []
    for seed in range(2):
        batch = random_inputs(model, seed=seed)
        if name == "vit":
            batch["labels"] = torch.tensor([0, 3, 1])
        elif name != "llama":
            mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
            batch["labels"] = (5 + torch.arange(mask.shape[1])) * mask - 100 * (1 - mask)
        batches.append(batch)
        logits = engine.outputs(batch)["logits"].double().softmax(-1)
        for row in range(3):
            if name == "vit":
                pairs = [(logits[row], batch["labels"][row])]
            elif name == "llama":
                real = batch["attention_mask"][row].bool()
                ids, said = batch["input_ids"][row][real], logits[row][real]
                pairs = list(zip(said[:-1], ids[1:], strict=True))
            else:
                labels = batch["labels"][row]
                pairs = [(p, y) for p, y in zip(logits[row], labels, strict=True) if y >= 0]
            probabilities += [p.tolist() for p, _ in pairs]
            answers += [int(y) for _, y in pairs]
    work = dataclasses.replace(
        make_work(), _batches=lambda split, n, **shape: batches, _reference=lambda: engine
    )
    found = fidelity.run(engine, fidelity.Options(), work)
    assert found["ece"] == pytest.approx(by_hand(probabilities, answers), abs=1e-6)
    assert found["ece"] > 0.01 and found["ece_n"] == 6 and found["kl"] == 0
    if name == "vit":
        for batch in batches:
            del batch["labels"]
        assert "ece" not in fidelity.run(engine, fidelity.Options(), work)
