"""ce, kd and latent against direct formulas on one batch, and what they refuse."""

import pytest
import torch

from compressor.distill import ce, kd, latent, minitron, predictions, runner
from compressor.errors import CompressError
from compressor.model.model import Pooling, pool
from compressor.training.options import Train

MEAN = Pooling("mean", True)
SHORT = {"steps": 6, "batch": 4, "length": 16, "lr": 2e-3, "warmup": 1, "precision": "float32"}


@pytest.fixture
def batch(make_work):
    """Four rows; three of them padded. Without labels, as text without labels comes."""
    found = make_work().batches("train", 1)[0]
    return {k: found[k] for k in ("input_ids", "attention_mask")}


def logits(model, batch):
    found = model.module(**{k: batch[k] for k in ("input_ids", "attention_mask")})
    return found.logits.double()


def next_token_pairs(z, batch):
    """Logits and targets where a token and its successor are real, one by one."""
    found = []
    for row, (ids, mask) in enumerate(
        zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ):
        for s in range(len(ids) - 1):
            if mask[s] and mask[s + 1]:
                found.append((z[row, s], ids[s + 1]))
    return torch.stack([a for a, _ in found]), torch.stack([b for _, b in found])


def test_ce_of_a_decoder(pico_llama, batch):
    model = pico_llama()
    z, targets = next_token_pairs(logits(model, batch), batch)
    wanted = -z.log_softmax(-1)[range(len(z)), targets].mean()
    got = ce.objective(ce.Options(), model, None)(batch)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_ce_of_a_classifier(pico_bert, batch):
    model = pico_bert(head="sequence-classification", num_labels=3)
    labels = torch.tensor([0, 2, 1, 2])
    wanted = -logits(model, batch).log_softmax(-1)[range(4), labels].mean()
    objective = ce.objective(ce.Options(), model, None)
    assert objective(batch | {"labels": labels}).item() == pytest.approx(wanted.item(), rel=1e-5)
    with pytest.raises(CompressError, match="needs labelled rows"):
        objective(batch)
    with pytest.raises(CompressError, match="label 3 and the model 3 classes"):
        objective(batch | {"labels": labels + 1})


@pytest.mark.parametrize(("kind", "mix"), [("forward", 0.0), ("reverse", 0.3)])
def test_kd_of_a_decoder(pico_llama, batch, kind, mix):
    student, teacher, t = pico_llama(), pico_llama(seed=1, hidden_size=64, head_dim=16), 2.0
    z_s, targets = next_token_pairs(logits(student, batch), batch)
    z_t, _ = next_token_pairs(logits(teacher, batch), batch)
    s, p = (z_s / t).log_softmax(-1), (z_t / t).log_softmax(-1)
    kl = p.exp() * (p - s) if kind == "forward" else s.exp() * (s - p)
    wanted = (1 - mix) * t * t * kl.sum(-1).mean()
    wanted = wanted - mix * z_s.log_softmax(-1)[range(len(z_s)), targets].mean()
    options = kd.Options(kind=kind, temperature=t, ce=mix)
    objective = kd.objective(options, student, teacher)
    assert not list(objective.parameters())
    loss = objective(batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    head = student.module.lm_head.weight
    wanted_gradient = torch.autograd.grad(wanted, head)[0]
    torch.testing.assert_close(
        torch.autograd.grad(loss, head)[0], wanted_gradient, rtol=1e-3, atol=1e-6
    )


def test_kd_of_a_classifier(pico_bert, batch):
    student, teacher = (pico_bert(head="sequence-classification", seed=i) for i in range(2))
    s, p = (logits(m, batch).log_softmax(-1) for m in (student, teacher))
    wanted = (p.exp() * (p - s)).sum(-1).mean()
    got = kd.objective(kd.Options(), student, teacher)(batch)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("method", [ce, kd])
def test_bare_encoders_are_sent_to_latent(pico_bert, method):
    with pytest.raises(CompressError) as caught:
        method.objective(method.Options(), pico_bert(), pico_bert())
    assert "distill.latent" in caught.value.hint


def test_other_vocabularies_and_tasks_are_refused(pico_bert, pico_llama):
    with pytest.raises(CompressError, match="vocabulary of 50 tokens and the student one of 96"):
        kd.objective(kd.Options(), pico_llama(), pico_llama(vocab_size=50))
    with pytest.raises(CompressError, match="vocabulary of 50"):
        latent.objective(latent.Options(), pico_bert(), pico_bert(vocab_size=50))
    with pytest.raises(CompressError, match="the teacher is a text-classification"):
        kd.objective(kd.Options(), pico_llama(), pico_bert(head="sequence-classification"))


def renamed(model, old, new):
    """The model with a tokenizer of the same size in which one token is called otherwise."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = {new if token == old else token: i for token, i in model.processor.get_vocab().items()}
    words = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    model.processor = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    return model


@pytest.mark.parametrize("method", [kd, latent, minitron])
def test_teachers_with_another_tokenizer_or_a_padded_table_are_refused(pico_llama, method):
    other = renamed(pico_llama(), "b", "ß")
    with pytest.raises(CompressError, match="its token 5 is 'ß', the student's 'b'"):
        method.objective(method.Options(), pico_llama(), other)
    with pytest.raises(CompressError) as caught:
        method.objective(method.Options(), pico_llama(), pico_llama(vocab_size=128))
    assert "share a tokenizer of 96 tokens" in caught.value.what
    assert "table has 128 rows and the student's 96" in caught.value.what
    other.processor = None  # nothing to compare
    method.objective(method.Options(), pico_llama(), other)


def states(model, batch):
    found = model.base(
        **{k: batch[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True
    )
    real = batch["attention_mask"].bool()
    return [state[real].double() for state in found.hidden_states], found.last_hidden_state


def relative(s, t):
    return (s - t).square().sum() / t.square().sum()


def test_latent_terms_of_an_encoder(pico_bert, batch):
    student = pico_bert(pooling=MEAN, num_hidden_layers=2)
    teacher = pico_bert(pooling=MEAN, seed=1, num_hidden_layers=4)
    (s, last_s), (t, last_t) = states(student, batch), states(teacher, batch)
    e_s, e_t = (pool(x.double(), batch["attention_mask"], MEAN) for x in (last_s, last_t))
    wanted = {
        "hidden": 2.0 * relative(s[2], t[4]),
        "sentence": 3.0 * (1 - (e_s * e_t).sum(-1)).mean(),
        "layers": 0.5 * (relative(s[1], t[2]) + relative(s[2], t[4])) / 2,
        "embeddings": 0.1 * relative(s[0], t[0]),
    }
    weights = {"hidden": 2.0, "sentence": 3.0, "layers": 0.5, "embeddings": 0.1}
    objective = latent.objective(latent.Options(**weights), student, teacher)
    loss = objective(batch)
    assert loss.item() == pytest.approx(sum(wanted.values()).item(), rel=1e-4)
    assert objective.parts["sentence"].item() == pytest.approx(wanted["sentence"].item(), rel=1e-4)
    assert set(objective.parts) == {"state 0", "state 1", "state 2", "sentence"}
    assert not list(objective.parameters())


def test_latent_of_a_narrow_decoder_with_a_projector(pico_llama, batch):
    student, teacher = pico_llama(hidden_size=16, num_hidden_layers=2), pico_llama(seed=1)
    options = latent.Options(layers=1.0, layer_map=[(2, 1)])
    objective = latent.objective(options, student, teacher)
    (s, _), (t, _) = states(student, batch), states(teacher, batch)
    wanted = 0.0
    for i, j in ((2, 3), (1, 2)):
        lifted = s[i] @ objective.lift.weight.double().T
        wanted += relative(lifted, t[j]).item()
    assert objective(batch).item() == pytest.approx(wanted, rel=1e-4)
    assert {tuple(p.shape) for p in objective.parameters()} == {(32, 16)}


def test_latent_attention(pico_bert, batch):
    student, teacher = pico_bert(num_hidden_layers=1), pico_bert(seed=1)
    before = student.module.config._attn_implementation
    options = latent.Options(hidden=0, sentence=0, attention=1.0)
    got = latent.objective(options, student, teacher)(batch)
    assert student.module.config._attn_implementation == before
    maps = []
    for model in (student, teacher):
        model.module.set_attn_implementation("eager")
        maps.append(model.module(**batch, output_attentions=True).attentions[-1].double())
    total, count = 0.0, 0
    for b, mask in enumerate(batch["attention_mask"].bool()):
        a_s, a_t = (m[b][:, mask][:, :, mask] for m in maps)
        total += (a_t * (a_t / a_s).log()).sum().item()
        count += a_s.shape[0] * a_s.shape[1]
    assert got.item() == pytest.approx(total / count, rel=1e-4)
    with pytest.raises(CompressError, match="equal head counts"):
        latent.objective(options, pico_bert(num_attention_heads=2), teacher)


def test_latent_refuses_nothing_to_match_and_unknown_blocks(pico_bert):
    with pytest.raises(CompressError, match="every weight of distill"):
        latent.objective(latent.Options(hidden=0), pico_bert(), pico_bert())
    with pytest.raises(CompressError, match=r"layer_map pair \[4, 1\]"):
        latent.objective(latent.Options(layer_map=[(4, 1)]), pico_bert(), pico_bert())


def with_rows(work, every=8):
    """Batches with row numbers that come back after `every` batches."""
    plain = work._batches

    def batches(split, n, **shape):
        few = plain(split, every, **shape)
        size = len(few[0]["input_ids"])
        numbered = [b | {"row": torch.arange(i * size, (i + 1) * size)} for i, b in enumerate(few)]
        return [numbered[i % every] for i in range(every if n is None else n)]

    object.__setattr__(work, "_batches", batches)
    return work


def test_the_runner_trains_freezes_and_notes(pico_bert, make_work):
    student, teacher = pico_bert(pooling=MEAN, num_hidden_layers=1), pico_bert(pooling=MEAN, seed=1)
    teacher.module.requires_grad_(False)
    options = latent.Options(train=Train(**SHORT | {"steps": 30}), freeze_embeddings=True)
    objective = latent.objective(options, student, teacher)
    before = {k: v.clone() for k, v in student.module.state_dict().items()}
    work = with_rows(make_work(teacher))
    runner.run(student, objective, options, work)
    after = student.module.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and not any(k.startswith("embeddings.w") for k in moved)
    steps, losses = zip(*student.notes["loss"], strict=True)
    assert steps == (1, 10, 20, 30) and losses[-1] < losses[0]
    assert student.notes["training"]["steps"] == 30
    found = student.notes["validation"]
    assert found["rows"] == 32 and found["after"] < found["before"]


def test_the_validation_note_is_the_objective_before_and_after(pico_llama, make_work):
    student, teacher = pico_llama(num_hidden_layers=1), pico_llama(seed=1)
    options = kd.Options(train=Train(**SHORT))
    work = make_work(teacher)
    objective = kd.objective(options, student, teacher)

    def mean():
        with torch.no_grad():
            return sum(objective(b).item() for b in work.batches("validation", None)) / 4

    before = mean()
    runner.run(student, objective, options, work)
    found = student.notes["validation"]
    assert found["before"] == pytest.approx(before, rel=1e-6)
    assert found["after"] == pytest.approx(mean(), rel=1e-6) and found["rows"] == 16


def test_cached_and_asked_teachers_give_nearly_the_same_training(pico_bert, make_work):
    teacher = pico_bert(pooling=MEAN, seed=1)
    found = []
    for cached in (True, False):
        student = pico_bert(pooling=MEAN, num_hidden_layers=1)
        options = latent.Options(train=Train(**SHORT), cache_teacher=cached)
        objective = latent.objective(options, student, teacher)
        facts = runner.run(student, objective, options, with_rows(make_work(teacher)))
        found.append(facts["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_rows_longer_than_the_model_are_refused(pico_llama, make_work):
    options = ce.Options(train=Train(**SHORT | {"length": 200}))
    student = pico_llama()
    with pytest.raises(CompressError, match="at most 128 tokens"):
        runner.run(student, ce.objective(options, student, None), options, make_work())


def test_a_tied_decoder_distils(pico_llama, make_work):
    student, teacher = (
        pico_llama(tie_word_embeddings=True, intermediate_size=16),
        pico_llama(seed=1),
    )
    options = kd.Options(train=Train(**SHORT))
    runner.run(student, kd.objective(options, student, teacher), options, make_work(teacher))
    module = student.module
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_next_tokens_with_padding_on_either_side():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [0, 8, 9, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]),
    }
    mask, targets = predictions.next_tokens(batch)
    assert mask.tolist() == [[True, True, False], [False, True, True]]
    assert targets[mask].tolist() == [6, 7, 9, 4]
