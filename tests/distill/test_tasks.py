"""ce, kd and latent for every task against transformers' own loss and direct float64 formulas."""

import pytest
import torch

from compressor.distill import ce, kd, latent
from compressor.errors import CompressError
from compressor.model.forward import accepted, outputs
from compressor.training.losses import label_loss
from families import VOCABULARY, pico, random_inputs
from predicting import labelled, scored

LANGUAGE = ("llama", "gemma2", "gpt2", "bert", "roberta", "distilbert", "t5", "whisper")
MODELS = (*LANGUAGE, "vit", "deit")


def own_loss(model, batch):
    """The loss that transformers computes itself when it is given labels."""
    labels = batch.get("labels")
    if model.task == "causal-lm":  # row 1 is padded in front: its first token is not predicted
        mask = batch["attention_mask"]
        before = torch.cat([mask[:, :1] * 0, mask[:, :-1]], dim=1)
        labels = batch["input_ids"].masked_fill(mask * before == 0, -100)
    return model.module(**accepted(model, batch), labels=labels).loss


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", LANGUAGE)
def test_ce_is_the_loss_of_transformers(name, tied):
    model = pico(name, tie_word_embeddings=tied)
    batch = labelled(model)
    wanted = own_loss(model, batch)
    got = ce.objective(ce.Options(), model, None)(batch)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    table = model.module.get_input_embeddings().weight
    torch.testing.assert_close(
        torch.autograd.grad(got, table)[0],
        torch.autograd.grad(wanted, table)[0],
        rtol=1e-3,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_ce_of_images_is_the_loss_of_transformers(name):
    model = pico(name)
    batch = labelled(model)
    got = ce.objective(ce.Options(), model, None)(batch)
    assert got.item() == pytest.approx(own_loss(model, batch).item(), rel=1e-5)
    with pytest.raises(CompressError, match="label 5 and the model 5 classes"):
        ce.objective(ce.Options(), model, None)(batch | {"labels": torch.tensor([5, 0, 1])})
    del batch["labels"]
    with pytest.raises(CompressError, match="needs labelled rows"):
        ce.objective(ce.Options(), model, None)(batch)


@pytest.mark.parametrize("name", MODELS)
def test_kd_is_the_direct_formula(name):
    student, teacher = pico(name), pico(name, seed=1)
    batch = labelled(student)
    z_s, targets = scored(student, batch)
    z_t, _ = scored(teacher, batch)
    s, t = (z_s / 2).log_softmax(-1), (z_t / 2).log_softmax(-1)
    kl = 4 * (t.exp() * (t - s)).sum(-1)
    wanted = 0.7 * kl.mean() + 0.3 * label_loss(z_s.float(), targets).mean()
    got = kd.objective(kd.Options(temperature=2.0, ce=0.3), student, teacher)(batch)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_logits_are_whole_again_after_a_loss():
    model = pico("t5")
    batch = labelled(model)
    before = outputs(model, batch)["logits"]
    ce.objective(ce.Options(), model, None)(batch).backward()
    assert torch.equal(outputs(model, batch)["logits"], before) and before.shape[-1] == VOCABULARY


def test_teachers_of_other_classes_are_refused():
    with pytest.raises(CompressError, match="the teacher has 7 classes and the student 5"):
        kd.objective(kd.Options(), pico("vit"), pico("vit", num_labels=7))
    with pytest.raises(CompressError, match="the teacher is a fill-mask"):
        kd.objective(kd.Options(), pico("vit"), pico("bert"))


@pytest.mark.parametrize("name", ["bert", "t5", "whisper", "vit"])
@pytest.mark.parametrize("method", ["ce", "kd"])
def test_a_few_steps_lower_the_loss(name, method):
    student = pico(name)
    if method == "ce":
        objective = ce.objective(ce.Options(), student, None)
    else:
        objective = kd.objective(kd.Options(), student, pico(name, seed=1))
    batch = labelled(student)
    optimizer = torch.optim.AdamW(student.module.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        losses.append(objective(batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def relative(own, target, mask):
    """Squared distance over energy of the real positions, one by one."""
    pairs = [(o[k].double(), t[k].double()) for o, t, k in zip(own, target, mask, strict=True)]
    return sum((o - t).square().sum() for o, t in pairs) / sum(t.square().sum() for _, t in pairs)


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_latent_of_two_stacks(name):
    student, teacher = pico(name), pico(name, seed=1)
    batch = random_inputs(student)
    found = [m.module(**batch, output_hidden_states=True) for m in (student, teacher)]
    s, t = found
    assert torch.equal(s.encoder_hidden_states[-1], s.encoder_last_hidden_state)
    # Whisper hears silence as well as speech: all its positions count
    source = batch.get("attention_mask", torch.ones(s.encoder_last_hidden_state.shape[:2])).bool()
    answer = batch["decoder_attention_mask"].bool()
    last = relative(s.encoder_last_hidden_state, t.encoder_last_hidden_state, source)
    last = last + relative(s.decoder_hidden_states[-1], t.decoder_hidden_states[-1], answer)
    first = relative(s.encoder_hidden_states[0], t.encoder_hidden_states[0], source)
    first = first + relative(s.decoder_hidden_states[0], t.decoder_hidden_states[0], answer)
    objective = latent.objective(latent.Options(hidden=1.0, embeddings=0.5), student, teacher)
    assert objective(batch).item() == pytest.approx((last / 2 + first / 4).item(), rel=1e-4)
    assert not objective.cache_teacher
    with pytest.raises(CompressError, match="attention maps of an encoder-decoder"):
        latent.objective(latent.Options(attention=1.0), student, teacher)
    with pytest.raises(CompressError, match="this model has two"):
        latent.objective(latent.Options(layers=1.0, layer_map=[(1, 1)]), student, teacher)


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_latent_of_images_counts_every_patch(name):
    student, teacher = pico(name, num_hidden_layers=2), pico(name, seed=1)
    batch = random_inputs(student)
    s, t = (m.base(**batch, output_hidden_states=True) for m in (student, teacher))
    everything = torch.ones(s.last_hidden_state.shape[:2], dtype=torch.bool)
    wanted = relative(s.last_hidden_state, t.last_hidden_state, everything)
    objective = latent.objective(latent.Options(), student, teacher)
    assert objective(batch).item() == pytest.approx(wanted.item(), rel=1e-4)
    maps = latent.objective(latent.Options(hidden=0, attention=1.0), student, teacher)
    assert 0 < maps(batch).item() < float("inf")
    with pytest.raises(CompressError, match="patches of 4 pixels and the student of 8"):
        latent.objective(latent.Options(), pico(name, patch_size=8), teacher)
    with pytest.raises(CompressError, match="the teacher has image_size 16 and the student 32"):
        kd.objective(kd.Options(), pico(name, image_size=32), teacher)
