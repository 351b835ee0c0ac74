"""SquareHead against the formula in float64, with the states that the blocks themselves give."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from compressor.distill import squarehead
from compressor.errors import CompressError
from compressor.model.forward import accepted, without_cache
from families import pico
from predicting import labelled, scored

MODELS = ("llama", "gemma2", "gpt2", "bert", "distilbert", "t5", "whisper", "vit", "deit")
EPS = 2**-7  # of bfloat16


def block_outputs(model, batch):
    """What the blocks of every stack give; of the last one, what the norm behind it makes of it."""
    found, hooks = [], []
    for stack in model.family.stacks:
        found.append([])
        for block in model.blocks(stack):
            keep = lambda m, i, o, k=found[-1]: k.append(o[0] if isinstance(o, tuple) else o)  # noqa: E731
            hooks.append(block.register_forward_hook(keep))
    whole = []
    hooks.append(model.base.register_forward_hook(lambda m, i, o: whole.append(o)))
    with torch.no_grad():
        model.module(**accepted(model, batch), **without_cache(model))
    for hook in hooks:
        hook.remove()
    ends = [whole[0][k] for k in ("encoder_last_hidden_state",) if k in whole[0]]
    if "last_hidden_state" in whole[0]:
        ends.append(whole[0].last_hidden_state)
    else:  # T5 is its own backbone: its decoder's norm is asked
        ends.append(model.base.decoder.final_layer_norm(found[1][-1]))
    return [[*states[:-1], end] for states, end in zip(found, ends, strict=True)]


def reference(student, teacher, batch):
    """The sum over layers of mean((h_s - h_t)^2) / (mean(h_t^2) + eps), real tokens only."""
    names = ["attention_mask", "decoder_attention_mask"]  # sound and pixels come without one
    total = 0.0
    pairs = zip(block_outputs(student, batch), block_outputs(teacher, batch), names, strict=False)
    for own, above, name in pairs:
        for state, target in zip(own, above, strict=True):
            real = batch[name].bool() if name in batch else torch.ones(state.shape[:2]).bool()
            s, t = state[real].double(), target[real].double()
            total += ((s - t) ** 2).mean() / ((t**2).mean() + EPS)
    return total


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_formula(name):
    student, teacher = pico(name), pico(name, seed=1)
    batch = labelled(student)
    teacher.module.requires_grad_(False)
    weights = {"squarehead": 0.7, "ce": 0.5, "kl": 0.25, "temperature": 2.0}
    loss = squarehead.objective(squarehead.Options(**weights), student, teacher)
    got = loss(batch)
    features = reference(student, teacher, batch)
    with torch.no_grad():
        (z_s, targets), (z_t, _) = scored(student, batch), scored(teacher, batch)
        ce = cross_entropy(z_s, targets)
        s, t = (z_s / 2).log_softmax(-1), (z_t / 2).log_softmax(-1)
        kl = 4 * kl_div(s, t, log_target=True, reduction="batchmean")
    assert loss.parts["squarehead"].item() == pytest.approx(features.item(), rel=1e-5)
    wanted = 0.7 * features + 0.5 * ce + 0.25 * kl
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    got.backward()
    assert all(p.grad is not None for p in student.module.get_input_embeddings().parameters())


@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_without_a_head_only_states_count(name):
    student, teacher = (pico(name, seed=seed, head=False) for seed in (0, 1))
    batch = labelled(student)
    with pytest.raises(CompressError, match="this one is a feature-extraction model") as caught:
        squarehead.objective(squarehead.Options(), student, teacher)
    assert "ce: 0" in caught.value.hint
    loss = squarehead.objective(squarehead.Options(ce=0.0), student, teacher)
    wanted = reference(student, teacher, batch)
    assert loss(batch).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_what_padding_holds_does_not_count():
    student, teacher = pico("bert"), pico("bert", seed=1)
    batch = labelled(student)
    changed = copy.deepcopy(batch)
    changed["input_ids"][batch["attention_mask"] == 0] = 7
    loss = squarehead.objective(squarehead.Options(), student, teacher)
    assert loss(changed).item() == pytest.approx(loss(batch).item(), rel=1e-6)


def test_a_student_that_is_its_teacher_has_only_cross_entropy():
    student = pico("llama")
    loss = squarehead.objective(squarehead.Options(), student, pico("llama"))
    got = loss(labelled(student))
    assert loss.parts["squarehead"] == 0 and got.item() == pytest.approx(loss.parts["ce"].item())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"num_hidden_layers": 2}, "2 layers of width 32, the student 3 layers of width 32"),
        ({"hidden_size": 64}, "3 layers of width 64, the student 3 layers of width 32"),
    ],
)
def test_teachers_of_another_shape_are_refused(other, said):
    with pytest.raises(CompressError, match=said) as caught:
        squarehead.objective(squarehead.Options(), pico("llama"), pico("llama", **other))
    assert "teacher: stage:N" in caught.value.hint
